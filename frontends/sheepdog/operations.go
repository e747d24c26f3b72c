package sheepdog

import (
	"context"
	"fmt"

	"sheepdog/frontends/sheepdog/internal/wire"
)

// operation says what an operation code is, and what a request for it may be like.
type operation struct {
	name    string
	object  bool // the header names an object
	reads   bool // DataLength bytes are wanted
	payload need
	most    uint32 // bytes of payload or of wanted data
}

type need uint8

const (
	none  need = iota
	some       // a payload must come
	maybe      // one may
)

// operations is the protocol. The last one stands for all that is none.
var operations = [lastOp + 1]operation{
	wire.SD_OP_CREATE_AND_WRITE_OBJ: {name: "create_and_write_obj", object: true, payload: some, most: MaxPayload},
	wire.SD_OP_READ_OBJ:             {name: "read_obj", object: true, reads: true, most: MaxPayload},
	wire.SD_OP_WRITE_OBJ:            {name: "write_obj", object: true, payload: some, most: MaxPayload},
	wire.SD_OP_DISCARD_OBJ:          {name: "discard_obj", object: true, payload: maybe, most: maxNames},
	wire.SD_OP_NEW_VDI:              {name: "new_vdi", payload: some, most: maxNames},
	wire.SD_OP_LOCK_VDI:             {name: "lock_vdi", payload: some, most: maxNames},
	wire.SD_OP_RELEASE_VDI:          {name: "release_vdi", payload: maybe, most: maxNames},
	wire.SD_OP_GET_VDI_INFO:         {name: "get_vdi_info", payload: some, most: maxNames},
	wire.SD_OP_READ_VDIS:            {name: "read_vdis", reads: true, most: wire.BitmapSize},
	wire.SD_OP_FLUSH_VDI:            {name: "flush_vdi", object: true, payload: maybe, most: maxNames},
	wire.SD_OP_DEL_VDI:              {name: "del_vdi", payload: some, most: maxNames},
	wire.SD_OP_GET_CLUSTER_DEFAULT:  {name: "get_cluster_default", payload: maybe, most: maxNames},
	lastOp:                          {name: "unknown"},
}

// handlers carry operations out, on the reader's goroutine: they must not wait. They return
// the volume that something was submitted to, which waits for a kick; nil if there is none.
var handlers = [lastOp]func(s *session, o *op) Volume{
	wire.SD_OP_CREATE_AND_WRITE_OBJ: (*session).create,
	wire.SD_OP_READ_OBJ:             (*session).readObject,
	wire.SD_OP_WRITE_OBJ:            (*session).writeObject,
	wire.SD_OP_DISCARD_OBJ:          (*session).discard,
	wire.SD_OP_NEW_VDI:              slowly((*session).newVDI),
	wire.SD_OP_LOCK_VDI:             (*session).lockVDI,
	wire.SD_OP_RELEASE_VDI:          (*session).releaseVDI,
	wire.SD_OP_GET_VDI_INFO:         (*session).lookUpVDI,
	wire.SD_OP_READ_VDIS:            (*session).readVDIs,
	wire.SD_OP_FLUSH_VDI:            (*session).flush,
	wire.SD_OP_DEL_VDI:              slowly((*session).deleteVDI),
	wire.SD_OP_GET_CLUSTER_DEFAULT:  (*session).clusterDefault,
}

const lastOp = wire.SD_OP_GET_CLUSTER_DEFAULT + 1

func operationOf(op wire.Op) *operation { return &operations[min(op, lastOp)] }

func nameOf(op wire.Op) string {
	if name := operationOf(op).name; name != "" {
		return name
	}
	return operations[lastOp].name
}

// check decides whether a request may be carried out. It must not depend on anything that is
// not yet received: the payload, if any, is dealt with either way.
func (d *operation) check(r *wire.Request) error {
	switch {
	case r.ProtoVer > wire.MaxProto:
		return refuse(wire.SD_RES_VER_MISMATCH, fmt.Sprintf("protocol version %d", r.ProtoVer))
	case d.most == 0:
		return refuse(wire.SD_RES_INVALID_PARMS, fmt.Sprintf("operation %#x is unknown", uint8(r.Op)))
	case d.payload == none && r.HasPayload():
		return refuse(wire.SD_RES_INVALID_PARMS, d.name+" with a payload")
	case d.payload == some && !r.HasPayload():
		return refuse(wire.SD_RES_INVALID_PARMS, d.name+" without a payload")
	case (r.HasPayload() || d.reads) && r.DataLength > d.most:
		return refuse(wire.SD_RES_INVALID_PARMS, fmt.Sprintf("%s of %d bytes, at most %d are possible", d.name, r.DataLength, d.most))
	}
	return nil
}

// slowly makes of what may wait what does not.
func slowly(run func(*session, context.Context, *op)) func(*session, *op) Volume {
	return func(s *session, o *op) Volume {
		s.later(o, run)
		return nil
	}
}
