// Package api is the language of the admin API: its types, its errors, the stream of
// extents by which volumes travel, and a client. It is all that programs need which
// talk to a sheep; dog is one of them.
//
// Types are the wire format. A field, once released, keeps its name, its meaning and its
// unit: sizes and offsets are bytes, times are RFC 3339 in UTC, VDI ids and object ids are
// hexadecimal strings of 6 and 16 digits. Fields may be added; who reads must ignore what
// he does not know.
package api

// Version is the version of the API, the "v1" in its paths.
const Version = 1

// Prefix begins the path of every call.
const Prefix = "/api/v1"

// DefaultPort is where a sheep's admin API listens unless told otherwise.
const DefaultPort = "7003"

// ClientHeader must be on every call that changes something and has neither a JSON nor a
// binary body. Browsers do not let foreign pages set it, so they cannot make such calls.
const ClientHeader = "Sheepdog-Client"

// ErrorTrailer is the HTTP trailer that has the Error, as JSON, of a download that failed
// after it began. It is sent to clients that said "TE: trailers"; on others the connection
// is cut, so that nobody takes half a download for a whole one.
const ErrorTrailer = "Sheepdog-Error"

// Types of bodies.
const (
	TypeJSON    = "application/json"
	TypeEvents  = "application/x-ndjson"                // one JSON value a line
	TypeBytes   = "application/octet-stream"            // content of volumes, backups
	TypeExtents = "application/vnd.sheepdog.extents.v1" // see ExtentWriter
)
