package admin

import (
	"net/http"
	"slices"

	"sheepdog/frontends/admin/api"
)

// route is one call of the API, or one other thing that is served. Either answers (a JSON
// value) or serves (anything else) is set.
type route struct {
	method, path string
	summary      string
	query        []param
	anyQuery     bool
	perNode      bool // any node can be asked, with the parameter "node"

	body     any    // a value of the JSON body's type
	bodyType string // of another body

	answer     any    // a value of the JSON answer's type
	answerType string // of another answer
	status     int    // of success, if not 200
	events     any    // a value of the type of each line, with api.TypeEvents

	answers func(*call) (any, error)
	serves  func(*call) error
}

type param struct {
	name, kind, what string // kind: string, integer, boolean
}

func (r *route) has(key string) bool {
	return r.perNode && key == paramNode.name || slices.ContainsFunc(r.query, func(p param) bool { return p.name == key })
}

func (r *route) success() int {
	switch {
	case r.status != 0:
		return r.status
	case r.answers != nil && r.answer == nil:
		return http.StatusNoContent
	}
	return http.StatusOK
}

// Parameters that several calls have.
var (
	paramSnapshot   = param{"snapshot", "string", "tag or number of a snapshot; without it, the VDI itself"}
	paramOffset     = param{"offset", "integer", "first byte; default 0"}
	paramLength     = param{"length", "integer", "bytes; default: to the end"}
	paramObjectSize = param{"object_size", "integer", "bytes, of the VDI that is created"}
	paramCopies     = param{"copies", "integer", "of the VDI that is created"}
	paramRepair     = param{"repair", "boolean", "whether to remove leftovers"}
	paramNode       = param{"node", "string", "name or number of the node that is meant; without it, the one that is asked"}
)

const (
	vdiPath  = api.Prefix + "/vdis/{name}"
	nodePath = api.Prefix + "/nodes/{node}"
)

// allRoutes is all that is served, but for the page of other paths.
func allRoutes() []route {
	return slices.Concat(clusterRoutes, nodeRoutes, volumeRoutes, contentRoutes, attachedRoutes, iscsiRoutes, plainRoutes)
}

// clusterRoutes are about the cluster and its nodes: any node knows, and can do, the same.
var clusterRoutes = []route{
	{method: "GET", path: api.Prefix + "/version", summary: "Versions of the daemon and of the API", answer: api.ServerVersion{}, answers: (*call).version},
	{method: "GET", path: api.Prefix + "/cluster", summary: "The cluster as this node knows it", answer: api.Cluster{}, answers: (*call).cluster},
	{method: "POST", path: api.Prefix + "/cluster/format", summary: "Make a new cluster with this node as its first member",
		body: api.FormatRequest{}, answer: api.Cluster{}, answers: (*call).format},
	{method: "POST", path: api.Prefix + "/cluster/check", summary: "Check all VDIs, the disks of all nodes, and that all replicas are equal",
		query: []param{paramRepair, {"content", "boolean", "whether to read the content of all replicas; default true"}}, events: api.Event{}, serves: (*call).checkAll},
	{method: "POST", path: api.Prefix + "/cluster/shutdown", summary: "Stop the daemons of all nodes in an orderly way; none if one of them cannot be told",
		query: []param{{"force", "boolean", "whether to stop the others if some cannot be told"}}, status: http.StatusAccepted, answer: api.Names{}, answers: (*call).shutdown},
	{method: "PUT", path: api.Prefix + "/cluster/copies", summary: "Set how many copies volumes keep that do not choose; there are no others afterwards of those there are",
		body: api.CopiesRequest{}, answer: api.Cluster{}, answers: (*call).setCopies},
	{method: "GET", path: api.Prefix + "/nodes", summary: "The members of the cluster", answer: []api.Node{}, answers: (*call).nodes},
	{method: "PUT", path: nodePath + "/drain", summary: "Bring a node's data to others; it stays in sync until they are",
		query: []param{{"force", "boolean", "whether to do so if fewer nodes than copies are left"}}, answer: api.Node{}, answers: (*call).drainNode},
	{method: "DELETE", path: nodePath + "/drain", summary: "Let a node hold data again", answer: api.Node{}, answers: (*call).undrainNode},
	{method: "PUT", path: nodePath + "/weight", summary: "Set how much of the weight of a node's disks counts", body: api.WeightRequest{}, answer: api.Node{}, answers: (*call).weighNode},
	{method: "DELETE", path: nodePath, summary: "Make a node, which is down or drained and empty, one that is gone for good",
		query: []param{{"force", "string", "the node's name: what only it has is lost"}}, answer: api.Names{}, answers: (*call).removeNode},
	{method: "POST", path: nodePath + "/lost", summary: "Give up what only a node had on disks that it lacks: it is lost",
		query: []param{{"force", "string", "the node's name"}}, answer: api.Lost{}, answers: (*call).giveUpDisks},
	{method: "GET", path: api.Prefix + "/disks", summary: "The disks of all nodes", answer: []api.Disk{}, answers: (*call).allDisks},
	{method: "GET", path: api.Prefix + "/partitions", summary: "Who holds the partitions of all policies", answer: []api.Partition{}, answers: (*call).partitions,
		query: []param{{"node", "string", "only what this node holds, shall hold or learns"}}},
	{method: "GET", path: api.Prefix + "/recovery", summary: "How far data is where it shall be", answer: api.Recovery{}, answers: (*call).recovery},
	{method: "PUT", path: api.Prefix + "/recovery", summary: "Set when data is moved", body: api.RecoverySettings{}, answer: api.Recovery{}, answers: (*call).setRecovery},
	{method: "POST", path: api.Prefix + "/recovery/force", summary: "Bring the data of nodes that are down elsewhere now", answer: api.Names{}, answers: (*call).forceRecovery},
}

// nodeRoutes are about one node: the one that is asked, or another one that this asks.
var nodeRoutes = []route{
	{method: "GET", path: api.Prefix + "/node", perNode: true, summary: "How a node and its disks are doing", answer: api.NodeStatus{}, answers: (*call).node},
	{method: "GET", path: api.Prefix + "/node/disks", perNode: true, summary: "A node's disks", answer: []api.Disk{}, answers: (*call).disks},
	{method: "POST", path: api.Prefix + "/node/disks", perNode: true, summary: "Add a disk while the node runs",
		body: api.DiskRequest{}, status: http.StatusCreated, answer: api.Disk{}, answers: (*call).plug},
	{method: "DELETE", path: api.Prefix + "/node/disks", perNode: true, summary: "Take a disk out while the node runs; others hold what it held",
		query: []param{{"disk", "string", "its path or id"}}, answer: api.Disk{}, answers: (*call).unplug},
	{method: "GET", path: api.Prefix + "/node/transfers", perNode: true, summary: "What a node brings to others", answer: []api.Transfer{}, answers: (*call).transfersHere},
	{method: "GET", path: api.Prefix + "/node/scrub", perNode: true, summary: "How the reading of all that a node has is going", answer: api.ScrubState{}, answers: (*call).scrubState},
	{method: "POST", path: api.Prefix + "/node/scrub", perNode: true, summary: "Read all that a node has, and verify it",
		query: []param{{"repair", "boolean", "whether to bring what is corrupt from other nodes"}}, status: http.StatusAccepted, answer: api.ScrubState{}, answers: (*call).startScrub},
	{method: "POST", path: api.Prefix + "/node/shutdown", summary: "Stop a node's daemon in an orderly way",
		query: []param{paramNode}, status: http.StatusAccepted, answer: api.Names{}, answers: (*call).shutdownNode},
	{method: "GET", path: api.Prefix + "/log", perNode: true, summary: "The level of the log", answer: api.LogLevel{}, answers: (*call).logLevel},
	{method: "PUT", path: api.Prefix + "/log", perNode: true, summary: "Set the level of the log, until the daemon ends",
		body: api.LogLevel{}, answer: api.LogLevel{}, answers: (*call).setLogLevel},
	{method: "GET", path: api.Prefix + "/sessions", perNode: true, summary: "The clients of a node's frontends", answer: []api.Session{}, answers: (*call).sessions,
		query: []param{{"all", "boolean", "whether to list those of all nodes"}}},
	logoutRoute, knownRoute,
	{method: "GET", path: api.Prefix + "/exports", summary: "VDIs and snapshots with the URIs for clients", answer: []api.Export{}, answers: (*call).exports},
}

// volumeRoutes are about VDIs as a whole.
var volumeRoutes = []route{
	{method: "GET", path: api.Prefix + "/vdis", summary: "All VDIs and snapshots, by name", answer: []api.VDI{}, answers: (*call).list,
		query: []param{{"name", "string", "only this VDI and its snapshots"}}},
	{method: "POST", path: api.Prefix + "/vdis", summary: "Create a VDI", body: api.CreateRequest{}, status: http.StatusCreated, answer: api.VDI{}, answers: (*call).create},
	{method: "GET", path: vdiPath, summary: "One VDI or snapshot, its space counted block by block", query: []param{paramSnapshot}, answer: api.VDI{}, answers: (*call).info},
	{method: "DELETE", path: vdiPath, summary: "Delete a VDI or a snapshot; its space comes back in the background", query: []param{paramSnapshot}, answers: (*call).remove},
	{method: "PUT", path: vdiPath + "/size", summary: "Resize a VDI; what is beyond a smaller size is lost", body: api.ResizeRequest{}, answer: api.VDI{}, answers: (*call).resize},
	{method: "POST", path: vdiPath + "/snapshots", summary: "Take a snapshot", body: api.SnapshotRequest{}, status: http.StatusCreated, answer: api.VDI{}, answers: (*call).snapshot},
	{method: "POST", path: vdiPath + "/clone", summary: "Make a new VDI of a snapshot", body: api.CloneRequest{}, status: http.StatusCreated, answer: api.VDI{}, answers: (*call).clone},
	{method: "POST", path: vdiPath + "/rollback", summary: "Make a VDI what it was in a snapshot; what was written since is lost",
		body: api.RollbackRequest{}, answer: api.VDI{}, answers: (*call).rollback},
	{method: "PUT", path: vdiPath + "/copies", summary: "Set how many copies a VDI has, and all that may share objects with it: its snapshots, clones of them, and what it is a clone of",
		body: api.CopiesRequest{}, events: api.Event{}, serves: (*call).alterCopies},
	{method: "POST", path: vdiPath + "/check", summary: "Check a VDI and its snapshots", query: []param{paramRepair}, events: api.Event{}, serves: (*call).check},
	{method: "GET", path: vdiPath + "/objects", summary: "The objects of a VDI, and where they live",
		query: []param{paramSnapshot, paramOffset, paramLength}, events: api.Object{}, serves: (*call).objects},
}

// contentRoutes move content.
var contentRoutes = []route{
	{method: "GET", path: vdiPath + "/data", summary: "Read bytes", query: []param{paramSnapshot, paramOffset, paramLength}, answerType: api.TypeBytes, serves: (*call).read},
	{method: "PUT", path: vdiPath + "/data", summary: "Write bytes; durable when answered", query: []param{paramOffset}, bodyType: api.TypeBytes, answer: api.Written{}, answers: (*call).write},
	{method: "GET", path: vdiPath + "/extents", summary: "Export: the content with its holes", query: []param{paramSnapshot}, answerType: api.TypeExtents, serves: (*call).export},
	{method: "PUT", path: vdiPath + "/extents", summary: "Import: write content with its holes; durable when answered",
		query:    []param{{"create", "boolean", "whether to create the VDI; it is deleted again if the import fails"}, paramObjectSize, paramCopies},
		bodyType: api.TypeExtents, answer: api.Written{}, answers: (*call).load},
	{method: "GET", path: vdiPath + "/diff", summary: "Extents that differ between two snapshots, or a snapshot and now",
		query:  []param{{"from", "string", "tag or number of the older snapshot; without it, all that is allocated differs"}, {"to", "string", "tag or number of the newer snapshot; without it, the VDI itself"}},
		events: api.Extent{}, serves: (*call).diff},
	{method: "GET", path: vdiPath + "/backup", summary: "A backup of a snapshot, in full or since another one",
		query: []param{{"snapshot", "string", "tag or number"}, {"from", "string", "tag or number of the snapshot that the backup is the difference to"}}, answerType: api.TypeBytes, serves: (*call).backup},
	{method: "PUT", path: vdiPath + "/restore", summary: "Restore a backup into a VDI, and take its snapshot there", bodyType: api.TypeBytes, answer: api.VDI{}, answers: (*call).restore},
}

// betweenRoutes are what nodes ask of each other alone: they are not served.
var betweenRoutes = []route{
	{method: "POST", path: alteringsPath, perNode: true, body: alterWork{}, answer: api.Event{}, answers: (*call).beginAltering},
	{method: "GET", path: alteringsPath, perNode: true, query: []param{{"id", "string", ""}}, answer: api.Event{}, answers: (*call).alteringState},
	{method: "DELETE", path: alteringsPath, perNode: true, query: []param{{"id", "string", ""}}, answers: (*call).endAltering},
}

// attachedRoutes are about attributes and locks.
var attachedRoutes = []route{
	{method: "GET", path: vdiPath + "/attributes", summary: "All attributes of a VDI", answer: map[string]string{}, answers: (*call).attributes},
	{method: "GET", path: vdiPath + "/attributes/{key}", summary: "One attribute", answer: api.Attribute{}, answers: (*call).attribute},
	{method: "PUT", path: vdiPath + "/attributes/{key}", summary: "Set an attribute", body: api.Attribute{}, answers: (*call).setAttribute},
	{method: "DELETE", path: vdiPath + "/attributes/{key}", summary: "Remove an attribute", answers: (*call).removeAttribute},
	{method: "GET", path: api.Prefix + "/locks", summary: "The locked VDIs", answer: []api.Lock{}, answers: (*call).locks},
	{method: "PUT", path: vdiPath + "/lock", summary: "Lock a VDI: no other gateway takes it over, nobody deletes, shrinks or rolls it back", body: api.LockRequest{}, answers: (*call).lock},
	{method: "DELETE", path: vdiPath + "/lock", summary: "Unlock a VDI", query: []param{{"holder", "string", "only if this holder has it; without it, whoever has it"}}, answers: (*call).unlock},
}

// plainRoutes are what programs expect where they expect it.
var plainRoutes = []route{
	{method: "GET", path: api.Prefix + "/openapi.json", summary: "This description", answerType: api.TypeJSON, serves: (*call).description},
	{method: "GET", path: "/healthz", summary: "Whether the daemon answers", answerType: typeText, anyQuery: true, serves: (*call).healthz},
	{method: "GET", path: "/readyz", summary: "Whether the node serves volumes", answerType: typeText, anyQuery: true, serves: (*call).readyz},
	{method: "GET", path: "/metrics", summary: "Metrics for Prometheus", answerType: typeText, anyQuery: true, serves: (*call).prometheus},
	{method: "GET", path: "/debug/pprof/{profile...}", summary: "Profiles of the daemon, for go tool pprof", answerType: api.TypeBytes, anyQuery: true, serves: (*call).profile},
}

const typeText = "text/plain; charset=utf-8"
