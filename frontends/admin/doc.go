// Package admin is the frontend for people and programs that look after a sheep: an HTTP
// API with JSON under /api/v1 (package api has its types and a client), metrics for
// Prometheus at /metrics, /healthz, /readyz, profiles at /debug/pprof, and a page that
// shows the node live at /.
//
// One table (routes.go) is the API: the server, the OpenAPI description at
// /api/v1/openapi.json and the tests are made from it. Errors are api.Error as JSON; one
// table (errors.go) gives every kind its HTTP status.
//
// It promises: memory is bounded by Config.MaxTransfers times 4 MiB, beside what HTTP
// itself takes for Config.MaxConnections; content of volumes is never held as a whole.
// What an upload's answer says was written is durable. A download that fails after its
// beginning never looks complete.
//
// Who may call: on a loopback address everybody on the machine, but no web page from
// elsewhere (the Host header must name the loopback, and calls that change something must
// have what browsers do not let foreign pages send). On other addresses, or with a token
// configured, whoever has the token or a client certificate.
package admin
