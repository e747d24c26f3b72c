package wire

// Op is an operation code.
type Op uint8

// Operations that clients use.
const (
	SD_OP_CREATE_AND_WRITE_OBJ Op = 0x01
	SD_OP_READ_OBJ             Op = 0x02
	SD_OP_WRITE_OBJ            Op = 0x03
	SD_OP_DISCARD_OBJ          Op = 0x05
	SD_OP_NEW_VDI              Op = 0x11
	SD_OP_LOCK_VDI             Op = 0x12
	SD_OP_RELEASE_VDI          Op = 0x13
	SD_OP_GET_VDI_INFO         Op = 0x14
	SD_OP_READ_VDIS            Op = 0x15
	SD_OP_FLUSH_VDI            Op = 0x16
	SD_OP_DEL_VDI              Op = 0x17
	SD_OP_GET_CLUSTER_DEFAULT  Op = 0x18
)

// Flags of a request.
const (
	SD_FLAG_CMD_WRITE     uint16 = 0x01 // a payload follows
	SD_FLAG_CMD_COW       uint16 = 0x02
	SD_FLAG_CMD_CACHE     uint16 = 0x04 // durable only after a flush
	SD_FLAG_CMD_DIRECT    uint16 = 0x08
	SD_FLAG_CMD_PIGGYBACK uint16 = 0x10
	SD_FLAG_CMD_TGT       uint16 = 0x20 // the client shares the VDI with others
)

// Result is the outcome of a request.
type Result uint32

// Results.
const (
	SD_RES_SUCCESS           Result = 0x00
	SD_RES_UNKNOWN           Result = 0x01
	SD_RES_NO_OBJ            Result = 0x02
	SD_RES_EIO               Result = 0x03
	SD_RES_VDI_EXIST         Result = 0x04
	SD_RES_INVALID_PARMS     Result = 0x05
	SD_RES_SYSTEM_ERROR      Result = 0x06
	SD_RES_VDI_LOCKED        Result = 0x07
	SD_RES_NO_VDI            Result = 0x08
	SD_RES_NO_BASE_VDI       Result = 0x09
	SD_RES_NO_TAG            Result = 0x0E
	SD_RES_VDI_NOT_LOCKED    Result = 0x10
	SD_RES_SHUTDOWN          Result = 0x11
	SD_RES_FULL_VDI          Result = 0x13
	SD_RES_VER_MISMATCH      Result = 0x14
	SD_RES_NO_SPACE          Result = 0x15
	SD_RES_WAIT_FOR_FORMAT   Result = 0x16
	SD_RES_HALT              Result = 0x19
	SD_RES_READONLY          Result = 0x1A
	SD_RES_INODE_INVALIDATED Result = 0x1D
)

// MaxProto is the highest proto_ver that clients send. QEMU leaves it 0 in most requests.
const MaxProto = 2

// Types of locks.
const (
	LOCK_TYPE_NORMAL uint32 = 0
	LOCK_TYPE_SHARED uint32 = 1
)

// Sizes, in bytes.
const (
	HeaderSize = 48  // of every request and response
	MaxName    = 256 // of a VDI's name, and of a tag, with or without a terminating zero
	BitmapSize = 1 << 24 / 8
)
