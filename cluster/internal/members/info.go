package members

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/hashicorp/go-msgpack/v2/codec"
	"github.com/hashicorp/memberlist"
)

// Info is what a node tells the others about itself. Together, its texts have room for
// about 400 bytes.
type Info struct {
	ID          string         // of the node in its cluster, "" before it has one
	Zone        string         // failure domain
	Cluster     string         // id of its cluster, "" before it is in one
	Incarnation uint64         // counts the starts of the node
	Roles       []string       // what it does; words without comma
	Ports       map[string]int // by service
}

// Names of the tags that carry an Info.
const (
	tagID          = "id"
	tagZone        = "zone"
	tagCluster     = "cluster"
	tagIncarnation = "inc"
	tagRoles       = "roles"
	tagPorts       = "ports"
)

func (i Info) clone() Info {
	i.Roles, i.Ports = slices.Clone(i.Roles), maps.Clone(i.Ports)
	return i
}

// tags are what serf carries.
func (i Info) tags() map[string]string {
	t := map[string]string{}
	set := func(name, value string) {
		if value != "" {
			t[name] = value
		}
	}
	set(tagID, i.ID)
	set(tagZone, i.Zone)
	set(tagCluster, i.Cluster)
	if i.Incarnation > 0 {
		set(tagIncarnation, strconv.FormatUint(i.Incarnation, 10))
	}
	set(tagRoles, strings.Join(i.Roles, ","))
	var ports []string
	for _, service := range slices.Sorted(maps.Keys(i.Ports)) {
		ports = append(ports, fmt.Sprintf("%s=%d", service, i.Ports[service]))
	}
	set(tagPorts, strings.Join(ports, ","))
	return t
}

// infoOf reads the tags of a peer and leaves out what it cannot read.
func infoOf(t map[string]string) Info {
	i := Info{ID: t[tagID], Zone: t[tagZone], Cluster: t[tagCluster]}
	i.Incarnation, _ = strconv.ParseUint(t[tagIncarnation], 10, 64)
	if t[tagRoles] != "" {
		i.Roles = strings.Split(t[tagRoles], ",")
	}
	for p := range strings.SplitSeq(t[tagPorts], ",") {
		service, number, _ := strings.Cut(p, "=")
		if n, err := strconv.ParseUint(number, 10, 16); err == nil {
			if i.Ports == nil {
				i.Ports = map[string]int{}
			}
			i.Ports[service] = int(n)
		}
	}
	return i
}

func (i Info) validate() error {
	for _, r := range i.Roles {
		if r == "" || strings.Contains(r, ",") {
			return fmt.Errorf("role %q is not a word without comma", r)
		}
	}
	for service, n := range i.Ports {
		if service == "" || strings.ContainsAny(service, ",=") || n < 0 || n > 1<<16-1 {
			return fmt.Errorf("port %d of service %q is not possible", n, service)
		}
	}
	if n := len(encodeTags(i.tags())); n > memberlist.MetaMaxSize {
		return fmt.Errorf("what the node tells about itself takes %d bytes, %d are possible: choose a shorter zone", n, memberlist.MetaMaxSize)
	}
	return nil
}

// serf writes its tags behind this byte, in MessagePack.
const serfTags = 255

func encodeTags(t map[string]string) []byte {
	var b bytes.Buffer
	b.WriteByte(serfTags)
	if err := codec.NewEncoder(&b, &codec.MsgpackHandle{}).Encode(t); err != nil {
		panic(fmt.Sprintf("encode tags: %v", err)) // a map of strings always encodes
	}
	return b.Bytes()
}

// clusterOf reads the cluster from what memberlist carries, where serf has not read it yet.
func clusterOf(meta []byte) (string, error) {
	if len(meta) == 0 || meta[0] != serfTags {
		return "", errors.New("its tags are not readable")
	}
	t := map[string]string{}
	if err := codec.NewDecoderBytes(meta[1:], &codec.MsgpackHandle{}).Decode(&t); err != nil {
		return "", fmt.Errorf("its tags are not readable: %w", err)
	}
	return t[tagCluster], nil
}
