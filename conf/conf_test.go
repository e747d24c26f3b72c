package conf

import (
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spf13/pflag"
	"github.com/spf13/viper"
)

func write(t *testing.T, text string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "sheep.yaml")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// The sample has every key but those for tests, no other, and is what an empty file means.
func TestSampleIsComplete(t *testing.T) {
	v := viper.New()
	v.SetConfigType("yaml")
	if err := v.ReadConfig(strings.NewReader(Sample)); err != nil {
		t.Fatal(err)
	}
	got := slices.Sorted(slices.Values(v.AllKeys()))
	var want []string
	for _, k := range keys {
		if !k.hidden {
			want = append(want, k.name)
		}
	}
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("sample has\n%q\nthe table has\n%q", got, want)
	}
	empty, err := Load("", nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	full, err := Load(write(t, Sample), nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(empty, full) {
		t.Errorf("sample gives\n%+v\nnothing gives\n%+v", full, empty)
	}
}

func TestDefaults(t *testing.T) {
	c, err := Load("", nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	host, _ := os.Hostname()
	want := &Config{
		Node:    Node{Name: host, Address: "127.0.0.1", Disks: []string{"/var/lib/sheepdog"}, StateDir: "/var/lib/sheepdog/node"},
		Cluster: Cluster{Discovery: "mdns", Join: []string{}, IOTimeout: time.Minute},
		Listen:  Listen{Peer: "127.0.0.1:7001", Gossip: "127.0.0.1:7002", NBD: "127.0.0.1:10809", Native: "127.0.0.1:7000", ISCSI: "127.0.0.1:3260", Admin: "127.0.0.1:7003"},
		NBD:     NBD{Allow: []string{}, MaxConnections: 4096, Memory: 384 << 20, SessionMemory: 96 << 20},
		Native:  Native{Allow: []string{}, MaxConnections: 4096, Memory: 384 << 20, SessionMemory: 96 << 20},
		ISCSI: ISCSI{
			Prefix: "iqn.2026-11.io.sheepdog", BlockSize: 512, PhysicalBlock: 4096, Initiators: []string{}, Allow: []string{}, Portals: []string{},
			MaxConnections: 4096, Memory: 384 << 20, SessionMemory: 96 << 20,
		},
		Log:     Log{Level: "info", Format: "text"},
		Storage: Storage{LogLimit: 512 << 20, SmallWrite: 32 << 10, Reserve: ReserveAuto, Checkpoint: 30 * time.Second, OpenObjects: 4096, Workers: 32, ScrubRate: 16 << 20, ScrubEvery: 168 * time.Hour},
	}
	if !reflect.DeepEqual(c, want) {
		t.Errorf("got\n%+v\nwant\n%+v", c, want)
	}
}

func TestOrderOfSources(t *testing.T) {
	file := write(t, "node: {address: 127.0.0.2, name: 7}\nlog: {level: warn}\nlisten: {admin: \":99\"}\n")
	t.Setenv("SHEEP_LOG_LEVEL", "error")
	t.Setenv("SHEEP_NODE_DISKS", "/a, /b/")
	t.Setenv("SHEEP_DEBUG_STORE_DELAY", "3ms")
	t.Setenv("SHEEP_BIN", "/not/a/key")
	set := pflag.NewFlagSet("sheep", pflag.ContinueOnError)
	AddFlags(set)
	if err := set.Parse([]string{"--nbd", "none"}); err != nil {
		t.Fatal(err)
	}
	c, err := Load(file, set, map[string]any{"node.zone": "z"})
	if err != nil {
		t.Fatal(err)
	}
	if c.Node.Name != "7" || c.Node.Zone != "z" || !slices.Equal(c.Node.Disks, []string{"/a", "/b"}) || c.Node.StateDir != "/a/node" {
		t.Errorf("node: %+v", c.Node)
	}
	if c.Log.Level != "error" || c.Listen.NBD != "" || c.Listen.Admin != "127.0.0.2:99" || c.Debug.StoreDelay != 3*time.Millisecond {
		t.Errorf("%+v", c)
	}
	if err := set.Parse([]string{"--log-level=debug", "--disk=/c", "--disk=/d"}); err != nil {
		t.Fatal(err)
	}
	if c, err = Load(file, set, nil); err != nil || c.Log.Level != "debug" || !slices.Equal(c.Node.Disks, []string{"/c", "/d"}) {
		t.Errorf("%+v, %v", c, err)
	}
}

func TestGateway(t *testing.T) {
	c, err := Load(write(t, "node: {disks: []}\n"), nil, nil)
	if err != nil || len(c.Node.Disks) != 0 || c.Node.StateDir != gatewayDir {
		t.Errorf("%+v, %v", c, err)
	}
}

func TestRefusals(t *testing.T) {
	for _, c := range []struct {
		text string
		says []string
	}{
		{"storag:\n  x: 1", []string{"unknown key storag.x", "--print-config"}},
		{"storage:\n  lgo_limit: 1", []string{"unknown key storage.lgo_limit", "did you mean storage.log_limit?", "storage.scrub_rate"}},
		{"nbd: {tls: {crt: x}}", []string{"unknown key nbd.tls.crt", "did you mean nbd.tls.cert?", "nbd.tls.client_ca"}},
		{"nbd: {allow: {a: b}}", []string{"nbd.allow has no keys below it", "a list of networks"}},
		{"nbd: 5", []string{"nbd is a section", "nbd.unix"}},
		{"storage: {log_limit: many}", []string{"storage.log_limit", `"many"`, "a size"}},
		{"storage: {log_limit: -1}", []string{"storage.log_limit", `"-1"`}},
		{"storage: {log_limit: 1M}", []string{"storage.log_limit", "at least 2M"}},
		{"storage: {small_write: 1M}", []string{"storage.small_write", "64K"}},
		{"storage: {reserve: some}", []string{"storage.reserve", `"auto"`}},
		{"storage: {workers: 1.5}", []string{"storage.workers", "a number"}},
		{"storage: {checkpoint: 30}", []string{"storage.checkpoint", "a time"}},
		{"log: {level: loud}", []string{"log.level", `"loud"`, "debug, info, warn or error"}},
		{"log: {format: []}", []string{"log.format", "text or json"}},
		{"nbd: {allow: [10.0.0.0/8]}\niscsi: {allow: [10.0.0.0/8]}\nnode: {address: 10.0.0.1}", []string{"listen.peer", "cluster.secret_file", "insecure: true"}},
		{"insecure: perhaps", []string{"insecure", "true or false"}},
		{"node: {disks: 5}", []string{"node.disks", "a list of directories"}},
		{"node: {disks: [/a, /a/]}", []string{"node.disks", "twice"}},
		{"node: {address: \"1.2.3.4:5\"}", []string{"node.address", "without port"}},
		{"node: {name: {a: b}}", []string{"node.name has no keys below it"}},
		{"listen: {nbd: here}", []string{"listen.nbd", `"here"`, "HOST:PORT"}},
		{"listen: {nbd: \":99999\"}", []string{"listen.nbd", ":99999", "1 to 65535"}},
		{"listen: {admin: \"127.0.0.1:http\"}", []string{"listen.admin", ":http", "1 to 65535"}},
		{"listen: {nbd: \"0.0.0.0:1\"}", []string{"listen.nbd", "nbd.allow", "insecure: true"}},
		{"listen: {native: \"0.0.0.0:1\"}", []string{"listen.native", "native.allow", "insecure: true"}},
		{"native: {session_memory: 1G}", []string{"native.session_memory", "native.memory"}},
		{"nbd: {allow: [everybody]}", []string{"nbd.allow", "everybody"}},
		{"nbd: {tls: {cert: x}}", []string{"nbd.tls.cert and nbd.tls.key"}},
		{"admin: {tls: {client_ca: x}}", []string{"admin.tls.client_ca needs"}},
		{"log: {level: loud, format: xml}", []string{"log.level", "log.format"}},
		{"storage: [", []string{"yaml"}},
		{"- a\n- b", []string{"yaml"}},
	} {
		_, err := Load(write(t, c.text+"\n"), nil, nil)
		if err == nil {
			t.Errorf("%q was accepted", c.text)
			continue
		}
		for _, s := range c.says {
			if !strings.Contains(err.Error(), s) {
				t.Errorf("%q: %q does not say %q", c.text, err, s)
			}
		}
	}
	if _, err := Load("/nowhere/sheep.yaml", nil, nil); err == nil || !strings.Contains(err.Error(), "/nowhere/sheep.yaml") {
		t.Errorf("missing file: %v", err)
	}
}

func TestAccepted(t *testing.T) {
	for _, text := range []string{
		"", "storage:", "node: {address: \"::1\"}", "node: {address: localhost}", "insecure: true\nnode: {address: 10.0.0.1}",
		"nbd: {allow: [10.0.0.0/8]}\nnative: {allow: [10.0.0.0/8]}\niscsi: {allow: [10.0.0.0/8]}\nnode: {address: 10.0.0.1}\ncluster: {secret_file: /etc/sheepdog/secret}",
		"nbd: {allow: [10.0.0.0/8]}\niscsi: {chap: {user: u, secret_file: /etc/sheepdog/chap}}\nnode: {address: 10.0.0.1}\nlisten: {peer: none, native: none}",
		"nbd: {allow: [10.0.0.0/8]}\nnode: {address: 10.0.0.1}\nlisten: {peer: none, native: none, iscsi: none}", "storage: {reserve: 0, scrub_rate: 0}", "storage: {log_limit: 67108864}",
	} {
		if _, err := Load(write(t, text+"\n"), nil, nil); err != nil {
			t.Errorf("%q: %v", text, err)
		}
	}
}

func TestParseSize(t *testing.T) {
	for s, want := range map[string]int64{
		"0": 0, "4096": 4096, "64K": 64 << 10, "10g": 10 << 30, "1.5M": 3 << 19, "2KiB": 2048, "2KB": 2048, "7B": 7, "7E": 7 << 60, " 1T ": 1 << 40,
	} {
		if n, err := ParseSize(s); n != want || err != nil {
			t.Errorf("%q: %d, %v; want %d", s, n, err, want)
		}
	}
	for _, s := range []string{"", "K", "-1", "+1", "1X", "8E", "1.5", "1.2.3M", "0x10", "1e3", "1 0", "iB", "5iB", "9223372036854775808", "B"} {
		if n, err := ParseSize(s); err == nil {
			t.Errorf("%q is %d", s, n)
		}
	}
}

func FuzzParseSize(f *testing.F) {
	f.Add("10G")
	f.Add("1.5T")
	f.Fuzz(func(t *testing.T, s string) {
		if n, err := ParseSize(s); err == nil && n < 0 {
			t.Errorf("%q is %d", s, n)
		}
	})
}
