package conf

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/pflag"
	"github.com/spf13/viper"
)

// envPrefix begins the names of environment variables.
const envPrefix = "SHEEP"

// flags are the command line flags that set a key.
var flags = []struct{ name, key, usage string }{
	{"name", "node.name", "name of this node"},
	{"address", "node.address", "where this node is reached"},
	{"secret-file", "cluster.secret_file", "file with the secret that all nodes share"},
	{"nbd", "listen.nbd", `address of NBD, or "none"`},
	{"native", "listen.native", `address of the native protocol, or "none"`},
	{"iscsi", "listen.iscsi", `address of iSCSI, or "none"`},
	{"admin", "listen.admin", "address of the HTTP API"},
	{"log-level", "log.level", "debug, info, warn or error"},
	{"log-format", "log.format", "text or json"},
}

// AddFlags defines the flags that set keys.
func AddFlags(set *pflag.FlagSet) {
	for _, f := range flags {
		set.String(f.name, "", f.usage+" ("+f.key+")")
	}
	set.StringSlice("join", nil, "address of another node's gossip; may be repeated (cluster.join)")
	set.StringSlice("disk", nil, "directory that holds data; may be repeated (node.disks)")
}

// Load reads the configuration: defaults, then the file ("" for none), the environment,
// the flags that were given (set may be nil), and at last the overrides by key, which are
// the program's own. The errors of all keys come together.
func Load(file string, set *pflag.FlagSet, overrides map[string]any) (*Config, error) {
	c, err := defaults()
	if err != nil {
		return nil, err
	}
	v, err := read(file)
	if err != nil {
		return nil, err
	}
	if set != nil {
		for _, f := range flags {
			if set.Changed(f.name) {
				v.Set(f.key, set.Lookup(f.name).Value.String())
			}
		}
		for _, f := range []struct{ name, key string }{{"disk", "node.disks"}, {"join", "cluster.join"}} {
			if !set.Changed(f.name) {
				continue
			}
			list, err := set.GetStringSlice(f.name)
			if err != nil {
				return nil, err
			}
			v.Set(f.key, list)
		}
	}
	for k, value := range overrides {
		v.Set(k, value)
	}
	if err := c.apply(v); err != nil {
		return nil, err
	}
	return c, c.finish()
}

// defaults are what the sample says.
func defaults() (*Config, error) {
	v := viper.New()
	v.SetConfigType("yaml")
	if err := v.ReadConfig(strings.NewReader(Sample)); err != nil {
		return nil, fmt.Errorf("read the built-in configuration: %w", err)
	}
	c := new(Config)
	return c, c.apply(v)
}

func read(file string) (*viper.Viper, error) {
	v := viper.New()
	v.SetEnvPrefix(envPrefix)
	v.SetEnvKeyReplacer(strings.NewReplacer(".", "_"))
	v.AllowEmptyEnv(true)
	if file != "" {
		v.SetConfigFile(file)
		v.SetConfigType("yaml")
		if err := v.ReadInConfig(); err != nil {
			return nil, fmt.Errorf("read configuration %s: %w", file, err)
		}
	}
	if err := refuseUnknown(v, file); err != nil {
		return nil, err
	}
	for _, k := range keys {
		if err := v.BindEnv(k.name); err != nil {
			return nil, err
		}
	}
	return v, nil
}

// apply puts every value that v has into its field.
func (c *Config) apply(v *viper.Viper) error {
	var errs []error
	for _, k := range keys {
		if !v.IsSet(k.name) {
			continue
		}
		value := v.Get(k.name)
		err := k.set(c, value)
		switch {
		case err == nil:
		case errors.Is(err, errKind) || errors.Is(err, errRange):
			errs = append(errs, fmt.Errorf("%s: %s is not possible: it takes %s", k.name, show(value), k.allowed))
		default:
			errs = append(errs, fmt.Errorf("%s: %w: it takes %s", k.name, err, k.allowed))
		}
	}
	return errors.Join(errs...)
}

// show gives a value for a message; it may be anything that YAML can say.
func show(v any) string {
	s := fmt.Sprintf("%q", fmt.Sprint(v))
	if len(s) > 100 {
		s = s[:100] + "…"
	}
	return s
}

// refuseUnknown complains about keys that are not in the table.
func refuseUnknown(v *viper.Viper, file string) error {
	var errs []error
	for _, name := range slices.Sorted(slices.Values(v.AllKeys())) {
		if find(name) != nil {
			continue
		}
		if group := groupOf(name); group != "" {
			if v.Get(name) != nil { // an empty section is nothing to complain about
				errs = append(errs, fmt.Errorf("%s: %s is a section with keys of its own: %s", file, name, strings.Join(inGroup(group), ", ")))
			}
			continue
		}
		if k := parent(name); k != nil {
			errs = append(errs, fmt.Errorf("%s: %s has no keys below it: it takes %s", file, k.name, k.allowed))
			continue
		}
		errs = append(errs, fmt.Errorf("%s: unknown key %s: %s", file, name, suggest(name)))
	}
	return errors.Join(errs...)
}

func find(name string) *key {
	for i := range keys {
		if keys[i].name == name {
			return &keys[i]
		}
	}
	return nil
}

// parent is the key that name is below of, as for a list that was written as a map.
func parent(name string) *key {
	for i := range keys {
		if strings.HasPrefix(name, keys[i].name+".") {
			return &keys[i]
		}
	}
	return nil
}

// groupOf is name if that is a section.
func groupOf(name string) string {
	if len(inGroup(name)) > 0 {
		return name
	}
	return ""
}

func inGroup(group string) (names []string) {
	for _, k := range keys {
		if strings.HasPrefix(k.name, group+".") && !k.hidden {
			names = append(names, k.name)
		}
	}
	return names
}

// suggest says what was meant, most likely, and what there is beside it.
func suggest(name string) string {
	best, distance := "", len(name)
	for _, k := range keys {
		if d := editDistance(name, k.name); d < distance && !k.hidden {
			best, distance = k.name, d
		}
	}
	says := "sheep --print-config shows all keys"
	if distance <= max(2, len(name)/3) {
		says = "did you mean " + best + "? " + says
	}
	for group, _, ok := cutLast(name); ok; group, _, ok = cutLast(group) {
		if names := inGroup(group); len(names) > 0 {
			return says + "; " + group + " has " + strings.Join(names, ", ")
		}
	}
	return says
}

func cutLast(name string) (before, after string, ok bool) {
	i := strings.LastIndexByte(name, '.')
	if i < 0 {
		return "", name, false
	}
	return name[:i], name[i+1:], true
}

// editDistance is how many letters must be put in, left out or changed.
func editDistance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range a {
		before := row[0]
		row[0] = i + 1
		for j := range b {
			cost := before
			if a[i] != b[j] {
				cost++
			}
			before = row[j+1]
			row[j+1] = min(cost, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}

// finish fills in what depends on other keys or on the machine, and checks what concerns
// several keys.
func (c *Config) finish() error {
	if c.Node.Name == "" {
		host, err := os.Hostname()
		if err != nil || host == "" {
			return fmt.Errorf("node.name: the host has no name: give one")
		}
		c.Node.Name = host
	}
	var errs []error
	if _, _, err := net.SplitHostPort(c.Node.Address); err == nil || c.Node.Address == "" {
		errs = append(errs, fmt.Errorf("node.address: %q is not an address without port", c.Node.Address))
	}
	for i, d := range c.Node.Disks {
		d = filepath.Clean(d)
		if slices.Contains(c.Node.Disks[:i], d) {
			errs = append(errs, fmt.Errorf("node.disks: %s is listed twice", d))
		}
		c.Node.Disks[i] = d
	}
	if c.Node.StateDir == "" {
		c.Node.StateDir = gatewayDir
		if len(c.Node.Disks) > 0 {
			c.Node.StateDir = filepath.Join(c.Node.Disks[0], stateName)
		}
	}
	errs = append(errs, c.network()...)
	errs = append(errs, c.address("listen.nbd", &c.Listen.NBD, PortNBD), c.address("listen.native", &c.Listen.Native, PortNative), c.address("listen.iscsi", &c.Listen.ISCSI, PortISCSI),
		c.address("listen.admin", &c.Listen.Admin, PortAdmin), c.NBD.TLS.check("nbd.tls"), c.Admin.TLS.check("admin.tls"),
		c.ISCSI.check(), c.exposed(), c.nativeExposed(), c.exposedISCSI())
	if c.NBD.SessionMemory > c.NBD.Memory {
		errs = append(errs, fmt.Errorf("nbd.session_memory: one session must not have more than nbd.memory"))
	}
	if c.Native.SessionMemory > c.Native.Memory {
		errs = append(errs, fmt.Errorf("native.session_memory: one session must not have more than native.memory"))
	}
	return errors.Join(errs...)
}

// network checks what concerns other nodes.
func (c *Config) network() []error {
	errs := []error{c.address("listen.peer", &c.Listen.Peer, PortPeer), c.address("listen.gossip", &c.Listen.Gossip, PortGossip)}
	if c.Listen.Peer == "" {
		return errs[:1] // alone
	}
	host, _, err := net.SplitHostPort(c.Listen.Gossip)
	switch {
	case errs[1] != nil:
	case c.Listen.Gossip == "":
		errs = append(errs, errors.New("listen.gossip: a node with listen.peer needs it; listen.peer: none makes a node that is alone"))
	case err == nil && host != c.Node.Address:
		errs = append(errs, fmt.Errorf("listen.gossip: gossip is at node.address, %s: give a port only", c.Node.Address))
	}
	if c.Cluster.SecretFile == "" && !c.Insecure && !isLoopback(c.Listen.Peer) {
		errs = append(errs, fmt.Errorf("listen.peer: anybody who reaches %s could become a node of the cluster: set cluster.secret_file (make one with: openssl rand -hex 32), listen on loopback, or say insecure: true", c.Listen.Peer))
	}
	return errs
}

// isLoopback reports whether only this machine reaches an address.
func isLoopback(address string) bool {
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return true // reported already
	}
	a, err := netip.ParseAddr(host)
	return err == nil && a.IsLoopback() || host == "localhost"
}

// address completes a listen address.
func (c *Config) address(name string, a *string, port string) error {
	switch *a {
	case "none":
		*a = ""
		return nil
	case "":
		*a = ":" + port
	}
	host, p, err := net.SplitHostPort(*a)
	if err != nil || p == "" {
		return fmt.Errorf("%s: %q is not possible: it takes %s", name, *a, anAddress)
	}
	if n, err := strconv.ParseUint(p, 10, 16); err != nil || n == 0 {
		return fmt.Errorf("%s: %q has no port: it takes %s, where PORT is a number from 1 to 65535", name, *a, anAddress)
	}
	if host == "" {
		host = c.Node.Address
	}
	*a = net.JoinHostPort(host, p)
	return nil
}

func (t TLS) check(name string) error {
	switch {
	case (t.Cert == "") != (t.Key == ""):
		return fmt.Errorf("%s.cert and %s.key must be given together", name, name)
	case t.Cert == "" && t.ClientCA != "":
		return fmt.Errorf("%s.client_ca needs %s.cert and %s.key", name, name, name)
	}
	return nil
}

func (i ISCSI) check() error {
	c := i.Chap
	switch {
	case i.PhysicalBlock < i.BlockSize:
		return fmt.Errorf("iscsi.physical_block_size: a physical block is not shorter than a logical one, see iscsi.block_size")
	case i.SessionMemory > i.Memory:
		return fmt.Errorf("iscsi.session_memory: one session must not have more than iscsi.memory")
	case (c.User == "") != (c.SecretFile == ""):
		return fmt.Errorf("iscsi.chap.user and iscsi.chap.secret_file must be given together")
	case (c.MutualUser == "") != (c.MutualSecretFile == ""):
		return fmt.Errorf("iscsi.chap.mutual_user and iscsi.chap.mutual_secret_file must be given together")
	case c.User == "" && c.MutualUser != "":
		return fmt.Errorf("iscsi.chap.mutual_user needs iscsi.chap.user: only who has proven itself is answered")
	}
	return nil
}

// exposedISCSI is exposed for iSCSI.
func (c *Config) exposedISCSI() error {
	if c.Insecure || c.Listen.ISCSI == "" || len(c.ISCSI.Allow) > 0 || c.ISCSI.Chap.User != "" || isLoopback(c.Listen.ISCSI) {
		return nil
	}
	return fmt.Errorf("listen.iscsi: anybody who reaches %s could read and write every volume: set iscsi.allow or iscsi.chap, listen on loopback, or say insecure: true", c.Listen.ISCSI)
}

// exposed refuses to offer volumes to everybody who reaches the machine. The admin
// frontend looks at itself, for it knows what it serves.
func (c *Config) exposed() error {
	if c.Insecure || c.Listen.NBD == "" || len(c.NBD.Allow) > 0 || c.NBD.TLS.ClientCA != "" && !c.NBD.TLSOptional {
		return nil
	}
	if isLoopback(c.Listen.NBD) {
		return nil
	}
	return fmt.Errorf("listen.nbd: anybody who reaches %s could read and write every volume: set nbd.allow or nbd.tls.client_ca, listen on loopback, or say insecure: true", c.Listen.NBD)
}

func (c *Config) nativeExposed() error {
	if c.Insecure || c.Listen.Native == "" || len(c.Native.Allow) > 0 || isLoopback(c.Listen.Native) {
		return nil
	}
	return fmt.Errorf("listen.native: anybody who reaches %s could read and write every volume: set native.allow, listen on loopback, say listen.native: none or insecure: true", c.Listen.Native)
}
