// Package scsi decides what SCSI commands mean for a volume (SPC-4, SBC-3): a CDB and the state
// of a logical unit go in, a Plan comes out, with the data to answer or the ranges to read and
// write, or the sense data of a refusal. It is pure: it moves no data and waits for nothing.
//
//	command.go     the table of commands; lookup and refusal of what is not in it
//	block.go       reading, writing, comparing
//	thin.go        unmapping, writing the same, allocation
//	inquiry.go     who the unit is; vpd.go: vital product data
//	mode.go        mode pages; capacity.go: how big the unit is
//	groups.go      target port groups (ALUA)
//	opcodes.go     the report of supported commands and functions
//	reservation.go reservations, and who is kept out by them
//	sense.go       sense data
//
// Names of operation codes come from github.com/gostor/gotgt.
package scsi
