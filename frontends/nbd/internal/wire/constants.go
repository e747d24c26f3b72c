// Package wire is the pure codec of the NBD protocol: numbers, headers, options and
// replies, as NetworkBlockDevice/nbd doc/proto.md (and its extension-ext-header
// branch for extended headers) defines them. It reads and writes byte slices only.
// Everything that comes from a peer is checked before a length of it is believed;
// nothing here allocates by a number from the wire.
//
// Names are the specification's. Values that pojntfx/go-nbd has are taken from it.
package wire

import "github.com/pojntfx/go-nbd/pkg/protocol"

// Magic numbers.
const (
	NBDMAGIC                   = protocol.NEGOTIATION_MAGIC_OLDSTYLE
	IHAVEOPT                   = protocol.NEGOTIATION_MAGIC_OPTION
	NBD_REP_MAGIC              = protocol.NEGOTIATION_MAGIC_REPLY
	NBD_REQUEST_MAGIC          = protocol.TRANSMISSION_MAGIC_REQUEST
	NBD_SIMPLE_REPLY_MAGIC     = protocol.TRANSMISSION_MAGIC_REPLY
	NBD_STRUCTURED_REPLY_MAGIC = uint32(0x668e33ef)
	NBD_EXTENDED_REQUEST_MAGIC = uint32(0x21e41c71)
	NBD_EXTENDED_REPLY_MAGIC   = uint32(0x6e8a278c)
)

// Handshake flags (server) and client flags.
const (
	NBD_FLAG_FIXED_NEWSTYLE   = protocol.NEGOTIATION_HANDSHAKE_FLAG_FIXED_NEWSTYLE
	NBD_FLAG_NO_ZEROES        = uint16(1 << 1)
	NBD_FLAG_C_FIXED_NEWSTYLE = uint32(1 << 0)
	NBD_FLAG_C_NO_ZEROES      = uint32(1 << 1)
)

// Transmission flags.
const (
	NBD_FLAG_HAS_FLAGS            = protocol.NEGOTIATION_REPLY_FLAGS_HAS_FLAGS
	NBD_FLAG_READ_ONLY            = uint16(1 << 1)
	NBD_FLAG_SEND_FLUSH           = uint16(1 << 2)
	NBD_FLAG_SEND_FUA             = uint16(1 << 3)
	NBD_FLAG_SEND_TRIM            = uint16(1 << 5)
	NBD_FLAG_SEND_WRITE_ZEROES    = uint16(1 << 6)
	NBD_FLAG_SEND_DF              = uint16(1 << 7)
	NBD_FLAG_CAN_MULTI_CONN       = protocol.NEGOTIATION_REPLY_FLAGS_CAN_MULTI_CONN
	NBD_FLAG_SEND_CACHE           = uint16(1 << 10)
	NBD_FLAG_SEND_FAST_ZERO       = uint16(1 << 11)
	NBD_FLAG_BLOCK_STATUS_PAYLOAD = uint16(1 << 12)
)

// Option types.
const (
	NBD_OPT_EXPORT_NAME       = uint32(1)
	NBD_OPT_ABORT             = protocol.NEGOTIATION_ID_OPTION_ABORT
	NBD_OPT_LIST              = protocol.NEGOTIATION_ID_OPTION_LIST
	NBD_OPT_STARTTLS          = uint32(5)
	NBD_OPT_INFO              = protocol.NEGOTIATION_ID_OPTION_INFO
	NBD_OPT_GO                = protocol.NEGOTIATION_ID_OPTION_GO
	NBD_OPT_STRUCTURED_REPLY  = uint32(8)
	NBD_OPT_LIST_META_CONTEXT = uint32(9)
	NBD_OPT_SET_META_CONTEXT  = uint32(10)
	NBD_OPT_EXTENDED_HEADERS  = uint32(11)
)

// Option reply types.
const (
	NBD_REP_ACK                 = protocol.NEGOTIATION_TYPE_REPLY_ACK
	NBD_REP_SERVER              = protocol.NEGOTIATION_TYPE_REPLY_SERVER
	NBD_REP_INFO                = protocol.NEGOTIATION_TYPE_REPLY_INFO
	NBD_REP_META_CONTEXT        = uint32(4)
	NBD_REP_ERR_UNSUP           = protocol.NEGOTIATION_TYPE_REPLY_ERR_UNSUPPORTED
	NBD_REP_ERR_POLICY          = uint32(1<<31 | 2)
	NBD_REP_ERR_INVALID         = uint32(1<<31 | 3)
	NBD_REP_ERR_PLATFORM        = uint32(1<<31 | 4)
	NBD_REP_ERR_TLS_REQD        = uint32(1<<31 | 5)
	NBD_REP_ERR_UNKNOWN         = protocol.NEGOTIATION_TYPE_REPLY_ERR_UNKNOWN
	NBD_REP_ERR_SHUTDOWN        = uint32(1<<31 | 7)
	NBD_REP_ERR_BLOCK_SIZE_REQD = uint32(1<<31 | 8)
	NBD_REP_ERR_TOO_BIG         = uint32(1<<31 | 9)
	NBD_REP_ERR_EXT_HEADER_REQD = uint32(1<<31 | 10)
)

// Information types of NBD_REP_INFO.
const (
	NBD_INFO_EXPORT      = protocol.NEGOTIATION_TYPE_INFO_EXPORT
	NBD_INFO_NAME        = protocol.NEGOTIATION_TYPE_INFO_NAME
	NBD_INFO_DESCRIPTION = protocol.NEGOTIATION_TYPE_INFO_DESCRIPTION
	NBD_INFO_BLOCK_SIZE  = protocol.NEGOTIATION_TYPE_INFO_BLOCKSIZE
)

// Command flags.
const (
	NBD_CMD_FLAG_FUA         = uint16(1 << 0)
	NBD_CMD_FLAG_NO_HOLE     = uint16(1 << 1)
	NBD_CMD_FLAG_DF          = uint16(1 << 2)
	NBD_CMD_FLAG_REQ_ONE     = uint16(1 << 3)
	NBD_CMD_FLAG_FAST_ZERO   = uint16(1 << 4)
	NBD_CMD_FLAG_PAYLOAD_LEN = uint16(1 << 5)
)

// Request types.
const (
	NBD_CMD_READ         = protocol.TRANSMISSION_TYPE_REQUEST_READ
	NBD_CMD_WRITE        = protocol.TRANSMISSION_TYPE_REQUEST_WRITE
	NBD_CMD_DISC         = protocol.TRANSMISSION_TYPE_REQUEST_DISC
	NBD_CMD_FLUSH        = uint16(3)
	NBD_CMD_TRIM         = uint16(4)
	NBD_CMD_CACHE        = uint16(5)
	NBD_CMD_WRITE_ZEROES = uint16(6)
	NBD_CMD_BLOCK_STATUS = uint16(7)
)

// Structured and extended reply flags and chunk types.
const (
	NBD_REPLY_FLAG_DONE = uint16(1 << 0)

	NBD_REPLY_TYPE_NONE             = uint16(0)
	NBD_REPLY_TYPE_OFFSET_DATA      = uint16(1)
	NBD_REPLY_TYPE_OFFSET_HOLE      = uint16(2)
	NBD_REPLY_TYPE_BLOCK_STATUS     = uint16(5)
	NBD_REPLY_TYPE_BLOCK_STATUS_EXT = uint16(6)
	NBD_REPLY_TYPE_ERROR            = uint16(1<<15 | 1)
	NBD_REPLY_TYPE_ERROR_OFFSET     = uint16(1<<15 | 2)
)

// Status bits: base:allocation, and qemu:dirty-bitmap (QEMU docs/interop/nbd.rst).
const (
	NBD_STATE_HOLE  = uint32(1 << 0)
	NBD_STATE_ZERO  = uint32(1 << 1)
	NBD_STATE_DIRTY = uint32(1 << 0)
)

// Errno is a value of the error field; 0 is success.
type Errno uint32

// Error values.
const (
	NBD_SUCCESS   = Errno(0)
	NBD_EPERM     = Errno(protocol.TRANSMISSION_ERROR_EPERM)
	NBD_EIO       = Errno(5)
	NBD_ENOMEM    = Errno(12)
	NBD_EINVAL    = Errno(protocol.TRANSMISSION_ERROR_EINVAL)
	NBD_ENOSPC    = Errno(28)
	NBD_EOVERFLOW = Errno(75)
	NBD_ENOTSUP   = Errno(95)
	NBD_ESHUTDOWN = Errno(108)
)

// Limits of the specification.
const (
	// MaxString is the longest string that may be sent, in bytes ("Conventions").
	MaxString = 4096
	// DefaultMaxPayload is the payload that every server should take, in bytes ("Size constraints").
	DefaultMaxPayload = 1 << 25
	// NewstyleZeroes is the padding behind a reply to NBD_OPT_EXPORT_NAME, in bytes.
	NewstyleZeroes = 124
)
