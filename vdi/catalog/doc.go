// Package catalog is the replicated state of volumes: which VDIs and snapshots there are,
// what they are called, who may write them, and which deleted ones still have objects.
//
// Machine is a pure state machine: commands come in the cluster's order, with times,
// nodes and identities inside, and every node gets the same answers. It knows nothing of
// objects; what has to happen to them happens before (Reserve, then copying of the map,
// then Snapshot, Clone or Rollback; Move, then copying of all objects, then Moved) or after the command (Delete, then collection of
// garbage, then Collected).
//
// Vids are given by the rule of the native protocol, because its clients search by it:
// the low 24 bits of FNV-1a 64 of the name, then the next that is free. So that they
// find what lies behind it, a freed vid stays in use while there is a VDI behind it in its run of used vids. Then it is
// given up: in quarantine, until enough others have followed it, for clients may have it open that have not heard of it.
//
// Beside them it keeps records: short texts under keys, which mean something to who wrote them,
// and change by their revision alone.
package catalog
