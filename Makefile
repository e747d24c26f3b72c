# Sheepdog in Go. `make help` lists what can be done here.

SHELL       := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VERSION     ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
PREFIX      ?= /usr/local
LDFLAGS     := -X main.version=$(VERSION)
STATICCHECK := honnef.co/go/tools/cmd/staticcheck@v0.8.2

# Everything but the end-to-end tests runs under the race detector; the one that takes longest comes first. So do not
# pure packages that compute much: they have neither goroutines nor locks, which integration/layering sees to. Of the storage
# engine's tests, those that do less with the detector are run without it, too: power cuts at each operation, not at some.
PURE = $(addprefix sheepdog/cluster/,state internal/placement internal/replica internal/steward)
UNIT = sheepdog/storage $(filter-out sheepdog/integration sheepdog/storage $(PURE),$(shell go list ./...))
FUZZTIME ?= 20s

.PHONY: help build install tools check test race integration fuzz bench bench-cluster bench-native bench-iscsi bench-placement sim demo soak clean

help: ## show this list
	@echo "Sheepdog in Go: a distributed block store. Targets:"
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1	\2/p' $(MAKEFILE_LIST) | expand -t 24

build: ## compile bin/sheep (the daemon), bin/dog (the command line) and its older name bin/collie
	@mkdir -p bin
	go build -trimpath -ldflags '$(LDFLAGS)' -o bin/ ./cmd/sheep ./cmd/dog
	@ln -sf dog bin/collie

install: build ## copy the programs, their man pages and completions below PREFIX (default /usr/local)
	install -D -m 755 bin/sheep $(DESTDIR)$(PREFIX)/sbin/sheep
	install -D -m 755 bin/dog $(DESTDIR)$(PREFIX)/bin/dog
	ln -sf dog $(DESTDIR)$(PREFIX)/bin/collie
	install -D -m 644 conf/sheep.yaml $(DESTDIR)$(PREFIX)/share/doc/sheepdog/sheep.yaml
	@mkdir -p $(DESTDIR)$(PREFIX)/lib/systemd/system
	sed 's|@PREFIX@|$(PREFIX)|' conf/sheep.service >$(DESTDIR)$(PREFIX)/lib/systemd/system/sheep.service
	bin/dog man $(DESTDIR)$(PREFIX)/share/man/man1
	@set -e; cd $(DESTDIR)$(PREFIX)/share; \
	mkdir -p bash-completion/completions zsh/site-functions fish/vendor_completions.d; \
	for name in dog collie; do \
		$(CURDIR)/bin/$$name completion bash >bash-completion/completions/$$name; \
		$(CURDIR)/bin/$$name completion zsh >zsh/site-functions/_$$name; \
		$(CURDIR)/bin/$$name completion fish >fish/vendor_completions.d/$$name.fish; \
	done

tools: ## install from Debian what the tests, the demo and the benchmarks use (root or sudo)
	@integration/tools.sh

check: ## formatting, go vet, staticcheck, shell syntax
	@unformatted=$$(git ls-files -co --exclude-standard '*.go' | while read -r f; do [ -e "$$f" ] && echo "$$f"; done | xargs gofmt -l); \
	if [ -n "$$unformatted" ]; then echo "not formatted (run gofmt -w):"; echo "$$unformatted"; exit 1; fi
	go vet ./...
	go run $(STATICCHECK) ./...
	@git ls-files '*.sh' .ci/run | while read -r s; do bash -n "$$s"; done

test: tools check race sim integration ## install tools, then every check and test there is

race: ## the Go packages' own tests, under the race detector
	go test -timeout 20m -run 'Crash|Model|Failing' sheepdog/storage
	go test -timeout 20m $(PURE)
	go test -race -timeout 20m $(UNIT)

integration: build ## end to end: bin/sheep and bin/dog against real NBD and iSCSI clients, crashes and faults
	SHEEP_BIN=$(CURDIR)/bin go test -count=1 -timeout 30m -parallel 3 ./integration

fuzz: ## every fuzz test in turn, FUZZTIME (default 20s) each
	@go list -f '{{.ImportPath}} {{.Dir}}' ./... | while read -r pkg dir; do \
		for f in $$(sed -n 's/^func \(Fuzz[A-Za-z0-9_]*\)(.*/\1/p' "$$dir"/*_test.go 2>/dev/null); do \
			echo "== $$pkg $$f"; go test -run '^$$' -fuzz "^$$f\$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 1x "$$pkg"; \
		done; \
	done

bench: build tools ## speed beside nbdkit and qemu-nbd on the same disk (ROUNDS=3 RUNTIME=3 DISK=/var/tmp JSON=file)
	go run ./integration/bench -bin bin -rounds $(or $(ROUNDS),3) -seconds $(or $(RUNTIME),3) \
		$(if $(DISK),-disk $(DISK)) $(if $(JSON),-json $(JSON)) $(if $(ONLY),-only '$(ONLY)')

bench-cluster: build tools ## speed of three nodes with three copies, and of recovery (ROUNDS=3 RUNTIME=3 DISK=/var/tmp JSON=file ONLY=regexp)
	go run ./integration/bench -cluster -bin bin -rounds $(or $(ROUNDS),3) -seconds $(or $(RUNTIME),3) \
		$(if $(DISK),-disk $(DISK)) $(if $(JSON),-json $(JSON)) $(if $(ONLY),-only '$(ONLY)')

bench-native: build tools ## speed of the native protocol, one node and three, durable writes (ROUNDS=3 RUNTIME=3 DISK=/var/tmp JSON=file ONLY=regexp; beside another cluster: PEER=host:port PEER_PIDS=1,2,3)
	go run ./integration/bench -native -bin bin -rounds $(or $(ROUNDS),3) -seconds $(or $(RUNTIME),3) \
		$(if $(DISK),-disk $(DISK)) $(if $(JSON),-json $(JSON)) $(if $(ONLY),-only '$(ONLY)') \
		$(if $(PEER),-peer $(PEER)) $(if $(PEER_PIDS),-peer-pids $(PEER_PIDS))

bench-iscsi: build tools ## speed of iSCSI beside tgtd on the same disk (ROUNDS=3 RUNTIME=3 DISK=/var/tmp JSON=file ONLY=regexp)
	go run ./integration/bench -iscsi -bin bin -size 512 -rounds $(or $(ROUNDS),3) -seconds $(or $(RUNTIME),3) \
		$(if $(DISK),-disk $(DISK)) $(if $(JSON),-json $(JSON)) $(if $(ONLY),-only '$(ONLY)')

bench-placement: ## quality and cost of data placement, simulated up to 500 nodes
	go test -run '^$$' -bench . -benchtime 1x ./cluster/internal/placement

sim: ## a whole cluster simulated from seeds (N=2000; SEED=n tells what happens in one), and gateways of volumes (VDIS=1000)
	go test -count=1 -timeout 1h -v -run '$(if $(SEED),Simulation$$,.)' ./cluster/internal/sim -sim.n $(or $(N),2000) $(if $(SEED),-sim.seed $(SEED))
	$(if $(SEED),,go test -count=1 -timeout 1h -v -run 'Simulation$$' ./vdi -vdi.n $(or $(VDIS),1000))

demo: build tools ## three sheep on this machine, an ext4 image on volume vm1, one sheep killed meanwhile (EXIT=1: stop when done; IMAGE=file NODES=1 ADDRESS=127.0.0.5)
	@integration/demo.sh

soak: build tools ## the crash and fault tests for longer: hundreds of kill -9 (ROUNDS=300), power cuts everywhere (SEEDS=10)
	go test -count=1 -timeout 2h -v -run 'Simulation' ./cluster/internal/sim -sim.n $(or $(SIM),10000)
	go test -count=1 -timeout 2h -v -run 'Simulation$$' ./vdi -vdi.n $(or $(VDIS),5000)
	SOAK_ROUNDS=$(or $(SEEDS),10) go test -count=1 -timeout 3h -run 'Crash|Model|Races' ./storage
	SHEEP_BIN=$(CURDIR)/bin SOAK_ROUNDS=$(or $(ROUNDS),300) go test -count=1 -v -timeout 3h -run 'Crash|Connects|Flock|Guest|ISCSIClients|NativeTgt|LargeVolume' ./integration

clean: ## remove what was built
	rm -rf bin .cache
