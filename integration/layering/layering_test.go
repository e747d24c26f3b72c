// Package layering guards the architecture: which package may import which, where third-party modules
// are at home, and that pure packages stay pure. It reads the source, it runs nothing.
package layering

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const module = "sheepdog"

// layers from the top down. A package imports only from its own layer and from those below it; across the
// border of two layers only what vocabulary names. cmd/sheep wires everything and may import everything.
var layers = []string{"cmd", "frontends", "vdi", "cluster", "storage"}

// vocabulary is what a layer shows to the layers above: nouns, requests, errors. Anything else that a layer needs of
// another one is an interface of its own, plugged in by cmd/sheep.
var vocabulary = []string{"vdi", "storage/object"}

// crossings are imports across a border beyond the vocabulary, each with its reason.
var crossings = map[[2]string]string{
	{"cmd/dog", "frontends/admin/api"}:      "the command line is the API's first client",
	{"cluster/internal/sim", "vdi/catalog"}: "the simulation of a whole cluster, tests alone, has owners as the catalog decides them",
}

// pure packages decide and never act.
var pure = []string{"vdi/catalog", "cluster/state", "cluster/internal/placement", "cluster/internal/replica", "cluster/internal/steward", "cluster/internal/gateway", "cluster/internal/peer/internal/record", "storage/object", "frontends/nbd/internal/wire", "frontends/iscsi/access", "frontends/iscsi/internal/pdu", "frontends/iscsi/internal/login", "frontends/iscsi/internal/scsi"}

// impure are the packages whose import gives a package sockets, files, clocks or randomness.
var impure = []string{"os", "os/exec", "os/signal", "net", "net/http", "syscall", "math/rand", "math/rand/v2", "crypto/rand", "golang.org/x/sys/unix", "sync", "log", "log/slog", "context"}

// clocks are functions of package time that look at or wait for the clock: its types are welcome in pure packages.
var clocks = []string{"Now", "Since", "Until", "Sleep", "After", "AfterFunc", "Tick", "NewTicker", "NewTimer"}

// exceptions to impure, each with its reason.
var exceptions = map[[2]string]string{
	{"vdi/catalog", "sync"}: "the catalog has one writer and many readers: a lock guards its maps, it decides nothing",
}

// home is the package (with what is below it) that uses a third-party module: one, but for the few that are as
// good as the standard library. Tests may use any.
var home = map[string][]string{
	"github.com/hashicorp/raft":           {"cluster/internal/consensus"},
	"github.com/hashicorp/raft-wal":       {"cluster/internal/consensus"},
	"github.com/hashicorp/go-hclog":       {"cluster/internal/consensus"},
	"github.com/hashicorp/serf":           {"cluster/internal/members"},
	"github.com/hashicorp/memberlist":     {"cluster/internal/members"},
	"github.com/hashicorp/mdns":           {"cluster/internal/members"},
	"github.com/hashicorp/go-msgpack":     {"cluster/internal/members"},
	"github.com/spf13/viper":              {"conf"},
	"github.com/go-viper/mapstructure":    {"conf"},
	"github.com/spf13/cobra":              {"cmd/dog", "cmd/sheep"},
	"github.com/spf13/pflag":              {"cmd/dog", "cmd/sheep", "conf"},
	"github.com/schollz/progressbar":      {"cmd/dog"},
	"github.com/dustin/go-humanize":       {"cmd/dog", "frontends"},
	"golang.org/x/term":                   {"cmd/dog"},
	"github.com/pojntfx/go-nbd":           {"frontends/nbd/internal/wire"},
	"github.com/gostor/gotgt":             {"frontends/iscsi/internal/scsi"},
	"github.com/prometheus/client_golang": {"frontends/admin"},
	"github.com/zeebo/xxh3":               {"storage", "cluster", "vdi"},
	"go.yaml.in/yaml":                     {"conf", "cmd/dog"},
	"golang.org/x/crypto":                 {"cluster/internal/peer"},
	"golang.org/x/sys":                    {"storage/disk", "frontends/internal/stream", "cluster", "integration/rig"},
	"golang.org/x/sync":                   {"cmd", "frontends", "vdi", "cluster", "storage"},
}

// source is one Go file of the tree.
type source struct {
	pkg  string // folder below the top, with slashes
	name string
	test bool
	file *ast.File
	set  *token.FileSet
}

func (s source) imports(t *testing.T) []string {
	var paths []string
	for _, spec := range s.file.Imports {
		path, err := strconv.Unquote(spec.Path.Value)
		if err != nil {
			t.Fatal(err)
		}
		paths = append(paths, path)
	}
	return paths
}

func tree(t *testing.T) []source {
	t.Helper()
	const top = "../.."
	var all []source
	err := filepath.WalkDir(top, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			if name := d.Name(); path != top && (strings.HasPrefix(name, ".") || name == "testdata" || name == "bin") {
				return filepath.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(path, ".go") {
			return nil
		}
		set := token.NewFileSet()
		file, err := parser.ParseFile(set, path, nil, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		pkg, err := filepath.Rel(top, filepath.Dir(path))
		if err != nil {
			return err
		}
		all = append(all, source{filepath.ToSlash(pkg), d.Name(), strings.HasSuffix(path, "_test.go"), file, set})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(all) < 50 {
		t.Fatalf("found only %d files: is this the top of the tree?", len(all))
	}
	return all
}

// below reports whether a package is one of the folders or in one.
func below(pkg string, folders ...string) bool {
	for _, f := range folders {
		if pkg == f || strings.HasPrefix(pkg, f+"/") {
			return true
		}
	}
	return false
}

func layerOf(pkg string) int {
	return slices.IndexFunc(layers, func(l string) bool { return below(pkg, l) })
}

func TestImportsGoDown(t *testing.T) {
	for _, s := range tree(t) {
		if s.pkg == "." {
			continue
		}
		for _, path := range s.imports(t) {
			to, own := strings.CutPrefix(path, module+"/")
			if !own {
				continue
			}
			if why := forbidden(s, to); why != "" {
				t.Errorf("%s/%s imports %s: %s", s.pkg, s.name, to, why)
			}
		}
	}
}

// forbidden says why a package of the tree must not import another, or "".
func forbidden(s source, to string) string {
	switch from := s.pkg; {
	case below(from, "integration"):
		if !below(to, "integration") {
			return "end-to-end tests know the product from outside only"
		}
		return ""
	case below(to, "integration"):
		return "the product knows nothing of its end-to-end tests"
	case from == "cmd/sheep":
		return ""
	case below(to, "conf") && !below(from, "conf"):
		return "configuration is read by cmd/sheep and handed down"
	case below(from, "conf"):
		return "conf knows no other package"
	case crossings[[2]string{from, to}] != "":
		return ""
	}
	from, target := layerOf(s.pkg), layerOf(to)
	switch {
	case from < 0 || target < 0:
		return "no layer has it"
	case target < from:
		return "a layer imports only what is below it"
	case target > from && !slices.Contains(vocabulary, to) && !s.test:
		return "across a border only the vocabulary is imported; declare an interface and let cmd/sheep plug it in"
	case layers[from] == "frontends" && sibling(s.pkg) != sibling(to) && target == from && sibling(to) != "internal":
		return "frontends do not know each other"
	}
	return ""
}

// sibling is the name of the frontend that a package belongs to.
func sibling(pkg string) string {
	return strings.SplitN(pkg+"//", "/", 3)[1]
}

func TestPurePackagesArePure(t *testing.T) {
	for _, s := range tree(t) {
		if s.test || !slices.Contains(pure, s.pkg) {
			continue
		}
		for _, path := range s.imports(t) {
			if slices.Contains(impure, path) && exceptions[[2]string{s.pkg, path}] == "" {
				t.Errorf("%s/%s is pure and imports %s", s.pkg, s.name, path)
			}
		}
		ast.Inspect(s.file, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.GoStmt:
				t.Errorf("%s: a pure package starts a goroutine", s.set.Position(n.Pos()))
			case *ast.ChanType:
				t.Errorf("%s: a pure package has a channel", s.set.Position(n.Pos()))
			case *ast.SelectorExpr:
				if x, ok := n.X.(*ast.Ident); ok && x.Name == "time" && slices.Contains(clocks, n.Sel.Name) {
					t.Errorf("%s: a pure package uses time.%s", s.set.Position(n.Pos()), n.Sel.Name)
				}
			}
			return true
		})
	}
}

func TestModulesHaveOneHome(t *testing.T) {
	for _, s := range tree(t) {
		if s.test {
			continue
		}
		for _, path := range s.imports(t) {
			first, _, _ := strings.Cut(path, "/")
			if !strings.Contains(first, ".") {
				continue // the standard library, or our own
			}
			known := false
			for mod, folders := range home {
				if path != mod && !strings.HasPrefix(path, mod+"/") {
					continue
				}
				known = true
				if !below(s.pkg, folders...) {
					t.Errorf("%s/%s imports %s, which is at home in %v", s.pkg, s.name, path, folders)
				}
			}
			if !known {
				t.Errorf("%s/%s imports %s: give the module a home in this test, and DESIGN.md a reason", s.pkg, s.name, path)
			}
		}
	}
}

// There is no package-level logger, no process exit and no init below cmd.
func TestLibrariesAreLibraries(t *testing.T) {
	for _, s := range tree(t) {
		if s.test || below(s.pkg, "cmd", "integration") {
			continue
		}
		ast.Inspect(s.file, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.FuncDecl:
				if n.Recv == nil && n.Name.Name == "init" {
					t.Errorf("%s: init in a library", s.set.Position(n.Pos()))
				}
			case *ast.CallExpr:
				f, ok := n.Fun.(*ast.SelectorExpr)
				if !ok {
					return true
				}
				x, ok := f.X.(*ast.Ident)
				switch {
				case ok && x.Name == "os" && f.Sel.Name == "Exit":
					t.Errorf("%s: a library ends the process", s.set.Position(n.Pos()))
				case ok && x.Name == "slog" && slices.Contains([]string{"Debug", "Info", "Warn", "Error", "Default"}, f.Sel.Name):
					t.Errorf("%s: the default logger instead of an injected one", s.set.Position(n.Pos()))
				}
			}
			return true
		})
	}
}
