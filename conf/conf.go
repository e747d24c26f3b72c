// Package conf reads the daemon's configuration: a YAML file, the environment and flags,
// in rising order of importance, into one validated Config.
//
// Every key is in one table (keys.go) with the field it fills, and in the sample file
// sheep.yaml, whose values are the defaults; a test holds the two together. A key that is
// not in the table is refused, by its full name and with the nearest that is; so is a
// value that is not of the key's kind.
package conf

import (
	_ "embed"
	"time"
)

// Sample is the configuration file with every key, its default and what it means.
//
//go:embed sheep.yaml
var Sample string

// Config is the whole configuration. See sheep.yaml for what the keys mean.
type Config struct {
	Node    Node
	Cluster Cluster
	Listen  Listen
	NBD     NBD
	Native  Native
	ISCSI   ISCSI
	Admin   Admin
	Log     Log
	Storage Storage
	Debug   Debug

	Insecure bool
}

// Node is this node.
type Node struct {
	Name     string // never "" after Load
	Address  string // an IP address or host name
	Zone     string
	Disks    []string // empty: a gateway
	StateDir string   // never "" after Load
}

// Cluster is how nodes become one cluster.
type Cluster struct {
	Discovery  string   // mdns, join or none
	Join       []string // HOST or HOST:PORT
	SecretFile string   // "": everybody on the network is trusted
	IOTimeout  time.Duration
}

// Listen has HOST:PORT addresses, complete after Load; "" stands for none.
type Listen struct {
	Peer   string // "": the node is alone
	Gossip string
	NBD    string
	Native string
	ISCSI  string
	Admin  string
}

// NBD is the NBD frontend.
type NBD struct {
	Unix           string
	Allow          []string // CIDR, checked
	TLS            TLS
	TLSOptional    bool
	MaxConnections int
	Memory         int64 // bytes
	SessionMemory  int64 // bytes
}

// Native is the native Sheepdog protocol.
type Native struct {
	Unix           string
	Allow          []string // CIDR, checked
	MaxConnections int
	Memory         int64 // bytes
	SessionMemory  int64 // bytes
}

// ISCSI is the iSCSI frontend.
type ISCSI struct {
	Prefix         string // of targets' names
	BlockSize      int    // of logical blocks, bytes
	PhysicalBlock  int    // of physical blocks, as initiators are told, bytes
	Chap           Chap
	Secrets        string   // directory with a file for each credential
	Initiators     []string // iSCSI names
	Allow          []string // CIDR, checked
	Portals        []string // ADDRESS:PORT,GROUP
	MaxConnections int
	Memory         int64 // bytes
	SessionMemory  int64 // bytes
}

// Chap is who must prove to be who; the files have secrets.
type Chap struct {
	User, SecretFile             string
	MutualUser, MutualSecretFile string
}

// Admin is the admin frontend.
type Admin struct {
	TokenFile string
	TLS       TLS
}

// TLS names PEM files: none, Cert and Key, or all three.
type TLS struct {
	Cert, Key, ClientCA string
}

// Enabled reports whether there is a certificate to show.
func (t TLS) Enabled() bool { return t.Cert != "" }

// Log is the daemon's log.
type Log struct {
	Level  string // debug, info, warn or error
	Format string // text or json
}

// Storage tunes the store.
type Storage struct {
	LogLimit    int64 // bytes
	SmallWrite  int64 // bytes
	Reserve     int64 // bytes; ReserveAuto
	Checkpoint  time.Duration
	OpenObjects int
	Workers     int
	ScrubRate   int64 // bytes per second; 0: no scrubbing
	ScrubEvery  time.Duration
}

// ReserveAuto stands for a part of the disk.
const ReserveAuto = -1

// Debug has keys for tests; they are not in the sample.
type Debug struct {
	StoreDelay time.Duration // added to every object operation
}

// Standard ports and places.
const (
	PortPeer   = "7001"
	PortGossip = "7002"
	PortNBD    = "10809"
	PortNative = "7000"
	PortAdmin  = "7003"
	PortISCSI  = "3260"
	gatewayDir = "/var/lib/sheepdog/node"
	stateName  = "node" // below the first disk
)
