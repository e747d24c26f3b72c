// Package iscsi serves volumes to iSCSI initiators (RFC 7143): VMware, Windows, Linux, QEMU.
//
// Every VDI NAME is the target PREFIX:NAME with the volume as logical unit 0; a snapshot is the
// read-only target PREFIX:NAME.TAG; a group of them is one target with several units (see package access, which also
// says who may log in). Sessions have one connection and error recovery level 0.
// What a SCSI command means is decided by internal/scsi, what a login is negotiated to by
// internal/login, both pure; what this package does is to move the data.
//
// # Promises
//
// A write that was answered is seen by every session; SYNCHRONIZE CACHE covers what was answered
// to any session of this gateway before. A command whose data did not arrive in full is never
// carried out. A command that was aborted has ended, one way or the other, when the answer to the
// task management request is sent: nothing of it lands later. Resets concern the sessions of all gateways. COMPARE AND WRITE is atomic against
// all who use the volume, through whatever gateway and protocol. Reservations are in the cluster's
// catalog, and outlive any gateway: a change of them is answered when all gateways go by it.
//
// # Memory
//
// Buffers are taken only after a header was checked; see package stream. Bounds:
//
//	all of them      Config.MemoryLimit + 32 KiB per session
//	of one session   Config.SessionMemory + 32 KiB
//	of a login       64 KiB for a text
//	commands         the window that the session is told (MaxCmdSN), about 2 KiB each; beside it
//	                 maxImmediate immediate ones
//	connections      Config.MaxConnections, two goroutines each
//
// The reader never waits for memory while a command waits for its data: that may be behind.
// Such a command is answered with TASK SET FULL.
//
// # Files
//
//	server.go    listening, admission, shutdown; connect.go: a connection's login
//	session.go   the life of a session, order of commands; receive.go: from the socket to requests
//	command.go   SCSI commands from their header to their plan; dataout.go: their data
//	execute.go   plans carried out on the volume; slow.go: those that wait
//	copy.go      third-party copy
//	task.go      a command in flight and its answer; answer.go: all other answers
//	past.go      commands that a gateway which was taken for gone still has
//	echo.go      what resets and aborts through other gateways mean here
//	manage.go    task management; text.go: text, NOP, logout
//	lun.go       the units of a session; admit.go: who may log in to what
//	unit.go      logical units: attentions, modes, reservations
//	errors.go    how failures are answered
package iscsi
