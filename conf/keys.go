package conf

import (
	"errors"
	"fmt"
	"math"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// key is one configuration key: set checks a value and puts it into its field. allowed
// says for messages what values there are.
type key struct {
	name    string
	allowed string
	set     func(c *Config, value any) error
	hidden  bool // for tests only: not in the sample
}

// keys is the whole configuration.
var keys = []key{
	{name: "node.name", allowed: aText, set: text(func(c *Config) *string { return &c.Node.Name })},
	{name: "node.address", allowed: "an IP address or host name without port", set: text(func(c *Config) *string { return &c.Node.Address })},
	{name: "node.zone", allowed: aText, set: text(func(c *Config) *string { return &c.Node.Zone })},
	{name: "node.disks", allowed: "a list of directories", set: list(func(c *Config) *[]string { return &c.Node.Disks }, nil)},
	{name: "node.state_dir", allowed: "a directory", set: text(func(c *Config) *string { return &c.Node.StateDir })},

	{name: "cluster.discovery", allowed: "mdns, join or none", set: oneOf(func(c *Config) *string { return &c.Cluster.Discovery }, "mdns", "join", "none")},
	{name: "cluster.join", allowed: "a list of addresses as 10.0.0.12 or 10.0.0.12:7002", set: list(func(c *Config) *[]string { return &c.Cluster.Join }, nil)},
	{name: "cluster.secret_file", allowed: "a file", set: text(func(c *Config) *string { return &c.Cluster.SecretFile })},
	{name: "cluster.io_timeout", allowed: "a time of at least 1s", set: duration(func(c *Config) *time.Duration { return &c.Cluster.IOTimeout }, time.Second)},

	{name: "listen.peer", allowed: anAddress, set: text(func(c *Config) *string { return &c.Listen.Peer })},
	{name: "listen.gossip", allowed: anAddress, set: text(func(c *Config) *string { return &c.Listen.Gossip })},
	{name: "listen.nbd", allowed: anAddress, set: text(func(c *Config) *string { return &c.Listen.NBD })},
	{name: "listen.native", allowed: anAddress, set: text(func(c *Config) *string { return &c.Listen.Native })},
	{name: "listen.iscsi", allowed: anAddress, set: text(func(c *Config) *string { return &c.Listen.ISCSI })},
	{name: "listen.admin", allowed: anAddress, set: text(func(c *Config) *string { return &c.Listen.Admin })},

	{name: "nbd.unix", allowed: "the path of a socket", set: text(func(c *Config) *string { return &c.NBD.Unix })},
	{name: "nbd.allow", allowed: "a list of networks as 10.0.0.0/8", set: list(func(c *Config) *[]string { return &c.NBD.Allow }, network)},
	{name: "nbd.tls.cert", allowed: aFile, set: text(func(c *Config) *string { return &c.NBD.TLS.Cert })},
	{name: "nbd.tls.key", allowed: aFile, set: text(func(c *Config) *string { return &c.NBD.TLS.Key })},
	{name: "nbd.tls.client_ca", allowed: aFile, set: text(func(c *Config) *string { return &c.NBD.TLS.ClientCA })},
	{name: "nbd.tls.optional", allowed: aSwitch, set: truth(func(c *Config) *bool { return &c.NBD.TLSOptional })},
	{name: "nbd.max_connections", allowed: "a number from 1 to 1000000", set: number(func(c *Config) *int { return &c.NBD.MaxConnections }, 1, 1_000_000)},
	{name: "nbd.memory", allowed: "a size of at least 256M", set: size(func(c *Config) *int64 { return &c.NBD.Memory }, 256<<20, math.MaxInt64)},
	{name: "nbd.session_memory", allowed: "a size of at least 64M", set: size(func(c *Config) *int64 { return &c.NBD.SessionMemory }, 64<<20, math.MaxInt64)},

	{name: "native.unix", allowed: "the path of a socket", set: text(func(c *Config) *string { return &c.Native.Unix })},
	{name: "native.allow", allowed: "a list of networks as 10.0.0.0/8", set: list(func(c *Config) *[]string { return &c.Native.Allow }, network)},
	{name: "native.max_connections", allowed: "a number from 1 to 1000000", set: number(func(c *Config) *int { return &c.Native.MaxConnections }, 1, 1_000_000)},
	{name: "native.memory", allowed: "a size of at least 256M", set: size(func(c *Config) *int64 { return &c.Native.Memory }, 256<<20, math.MaxInt64)},
	{name: "native.session_memory", allowed: "a size of at least 64M", set: size(func(c *Config) *int64 { return &c.Native.SessionMemory }, 64<<20, math.MaxInt64)},

	{name: "iscsi.iqn_prefix", allowed: "a name as iqn.2026-11.io.sheepdog", set: iqn(func(c *Config) *string { return &c.ISCSI.Prefix })},
	{name: "iscsi.block_size", allowed: "512 or 4096", set: block(func(c *Config) *int { return &c.ISCSI.BlockSize })},
	{name: "iscsi.physical_block_size", allowed: "512 or 4096", set: block(func(c *Config) *int { return &c.ISCSI.PhysicalBlock })},
	{name: "iscsi.chap.user", allowed: aText, set: text(func(c *Config) *string { return &c.ISCSI.Chap.User })},
	{name: "iscsi.chap.secret_file", allowed: aSecret, set: text(func(c *Config) *string { return &c.ISCSI.Chap.SecretFile })},
	{name: "iscsi.chap.mutual_user", allowed: aText, set: text(func(c *Config) *string { return &c.ISCSI.Chap.MutualUser })},
	{name: "iscsi.chap.mutual_secret_file", allowed: aSecret, set: text(func(c *Config) *string { return &c.ISCSI.Chap.MutualSecretFile })},
	{name: "iscsi.secrets", allowed: "a directory", set: text(func(c *Config) *string { return &c.ISCSI.Secrets })},
	{name: "iscsi.initiators", allowed: "a list of iSCSI names", set: list(func(c *Config) *[]string { return &c.ISCSI.Initiators }, nil)},
	{name: "iscsi.allow", allowed: "a list of networks as 10.0.0.0/8", set: list(func(c *Config) *[]string { return &c.ISCSI.Allow }, network)},
	{name: "iscsi.portals", allowed: "a list of portals as 10.0.0.12:3260,2", set: list(func(c *Config) *[]string { return &c.ISCSI.Portals }, nil)},
	{name: "iscsi.max_connections", allowed: "a number from 1 to 60000", set: number(func(c *Config) *int { return &c.ISCSI.MaxConnections }, 1, 60_000)},
	{name: "iscsi.memory", allowed: "a size of at least 256M", set: size(func(c *Config) *int64 { return &c.ISCSI.Memory }, 256<<20, math.MaxInt64)},
	{name: "iscsi.session_memory", allowed: "a size of at least 64M", set: size(func(c *Config) *int64 { return &c.ISCSI.SessionMemory }, 64<<20, math.MaxInt64)},

	{name: "admin.token_file", allowed: "a file with a token", set: text(func(c *Config) *string { return &c.Admin.TokenFile })},
	{name: "admin.tls.cert", allowed: aFile, set: text(func(c *Config) *string { return &c.Admin.TLS.Cert })},
	{name: "admin.tls.key", allowed: aFile, set: text(func(c *Config) *string { return &c.Admin.TLS.Key })},
	{name: "admin.tls.client_ca", allowed: aFile, set: text(func(c *Config) *string { return &c.Admin.TLS.ClientCA })},

	{name: "insecure", allowed: aSwitch, set: truth(func(c *Config) *bool { return &c.Insecure })},

	{name: "log.level", allowed: "debug, info, warn or error", set: oneOf(func(c *Config) *string { return &c.Log.Level }, "debug", "info", "warn", "error")},
	{name: "log.format", allowed: "text or json", set: oneOf(func(c *Config) *string { return &c.Log.Format }, "text", "json")},

	{name: "storage.log_limit", allowed: "a size of at least 2M", set: size(func(c *Config) *int64 { return &c.Storage.LogLimit }, 2<<20, 1<<40)},
	{name: "storage.small_write", allowed: "a size from 1 to 64K", set: size(func(c *Config) *int64 { return &c.Storage.SmallWrite }, 1, 64<<10)},
	{name: "storage.reserve", allowed: `"auto" or a size`, set: reserve},
	{name: "storage.checkpoint", allowed: "a time of at least 100ms", set: duration(func(c *Config) *time.Duration { return &c.Storage.Checkpoint }, 100*time.Millisecond)},
	{name: "storage.open_objects", allowed: "a number from 16 to 1000000", set: number(func(c *Config) *int { return &c.Storage.OpenObjects }, 16, 1_000_000)},
	{name: "storage.workers", allowed: "a number from 1 to 4096", set: number(func(c *Config) *int { return &c.Storage.Workers }, 1, 4096)},
	{name: "storage.scrub_rate", allowed: "a size, for bytes per second, or 0 for no scrubbing", set: size(func(c *Config) *int64 { return &c.Storage.ScrubRate }, 0, math.MaxInt64)},
	{name: "storage.scrub_every", allowed: "a time of at least 1m", set: duration(func(c *Config) *time.Duration { return &c.Storage.ScrubEvery }, time.Minute)},

	{name: "debug.store_delay", allowed: "a time", hidden: true, set: duration(func(c *Config) *time.Duration { return &c.Debug.StoreDelay }, 0)},
}

const (
	aText     = "a text"
	aFile     = "a PEM file"
	aSecret   = "a file with a secret of 12 to 255 letters"
	aSwitch   = "true or false"
	anAddress = `HOST:PORT, :PORT or "none"`
)

// A value of the wrong kind, or beyond what is allowed: apply says what is.
var (
	errKind  = errors.New("not of the right kind")
	errRange = errors.New("out of range")
)

func text(field func(*Config) *string) func(*Config, any) error {
	return func(c *Config, v any) error {
		switch v := v.(type) {
		case string:
			*field(c) = strings.TrimSpace(v)
		case int, int64, uint64, float64: // a name may look like a number
			*field(c) = fmt.Sprint(v)
		default:
			return errKind
		}
		return nil
	}
}

func oneOf(field func(*Config) *string, values ...string) func(*Config, any) error {
	return func(c *Config, v any) error {
		s, ok := v.(string)
		if s = strings.ToLower(strings.TrimSpace(s)); !ok || !slices.Contains(values, s) {
			return errKind
		}
		*field(c) = s
		return nil
	}
}

// list takes a YAML list, or a text with commas, as the environment has it.
func list(field func(*Config) *[]string, check func(string) error) func(*Config, any) error {
	return func(c *Config, v any) error {
		var items []string
		switch v := v.(type) {
		case string:
			items = strings.Split(v, ",")
		case []string:
			items = v
		case []any:
			for _, i := range v {
				s, ok := i.(string)
				if !ok {
					return errKind
				}
				items = append(items, s)
			}
		default:
			return errKind
		}
		out := []string{}
		for _, s := range items {
			if s = strings.TrimSpace(s); s == "" {
				continue
			}
			if check != nil {
				if err := check(s); err != nil {
					return err
				}
			}
			out = append(out, s)
		}
		*field(c) = out
		return nil
	}
}

// iqn takes what names of targets begin with (RFC 7143 section 4.2.7).
func iqn(field func(*Config) *string) func(*Config, any) error {
	return func(c *Config, v any) error {
		s, ok := v.(string)
		s = strings.TrimSpace(s)
		if !ok || !strings.HasPrefix(s, "iqn.") || len(s) > 64 || strings.ToLower(s) != s || strings.ContainsAny(s, " \t,\x00") {
			return errKind
		}
		*field(c) = s
		return nil
	}
}

// block is a size of blocks that disks have.
func block(field func(*Config) *int) func(*Config, any) error {
	return func(c *Config, v any) error {
		n, err := wholeNumber(v)
		if err != nil {
			return err
		}
		if n != 512 && n != 4096 {
			return errRange
		}
		*field(c) = int(n)
		return nil
	}
}

func network(s string) error {
	_, err := netip.ParsePrefix(s)
	return err
}

func truth(field func(*Config) *bool) func(*Config, any) error {
	return func(c *Config, v any) error {
		switch fmt.Sprint(v) {
		case "true":
			*field(c) = true
		case "false":
			*field(c) = false
		default:
			return errKind
		}
		return nil
	}
}

func number(field func(*Config) *int, low, high int) func(*Config, any) error {
	return func(c *Config, v any) error {
		n, err := wholeNumber(v)
		if err != nil {
			return err
		}
		if n < int64(low) || n > int64(high) {
			return errRange
		}
		*field(c) = int(n)
		return nil
	}
}

func wholeNumber(v any) (int64, error) {
	s := fmt.Sprint(v)
	if strings.Trim(s, "0123456789") != "" {
		return 0, errKind
	}
	return ParseSize(s)
}

func size(field func(*Config) *int64, low, high int64) func(*Config, any) error {
	return func(c *Config, v any) error {
		n, err := ParseSize(fmt.Sprint(v))
		if err != nil {
			return err
		}
		if n < low || n > high {
			return errRange
		}
		*field(c) = n
		return nil
	}
}

func reserve(c *Config, v any) error {
	if v == "auto" {
		c.Storage.Reserve = ReserveAuto
		return nil
	}
	return size(func(c *Config) *int64 { return &c.Storage.Reserve }, 0, math.MaxInt64)(c, v)
}

func duration(field func(*Config) *time.Duration, low time.Duration) func(*Config, any) error {
	return func(c *Config, v any) error {
		d, err := time.ParseDuration(fmt.Sprint(v))
		if err != nil {
			return errKind
		}
		if d < low {
			return errRange
		}
		*field(c) = d
		return nil
	}
}
