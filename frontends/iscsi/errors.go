package iscsi

import (
	"context"
	"errors"
	"fmt"

	"sheepdog/frontends/iscsi/internal/pdu"
	"sheepdog/frontends/iscsi/internal/scsi"
	"sheepdog/vdi"
)

// results maps every kind of error of package vdi to what SCSI and a login can say. What will
// be better by itself is BUSY, which initiators try again.
var results = []struct {
	kind   error
	status scsi.Status
	code   scsi.Code
	login  pdu.LoginStatus
}{
	{vdi.ErrNotFound, scsi.StatusCheck, scsi.NoLogicalUnit, pdu.LoginNotFound},
	{vdi.ErrExists, scsi.StatusCheck, scsi.InternalFailure, pdu.LoginTargetError},
	{vdi.ErrInvalid, scsi.StatusCheck, scsi.OutOfRange, pdu.LoginNotFound}, // the volume was shrunk
	{vdi.ErrNoSpace, scsi.StatusCheck, scsi.SpaceAllocation, pdu.LoginTargetError},
	{vdi.ErrCorrupt, scsi.StatusCheck, scsi.UnrecoveredRead, pdu.LoginTargetError},
	{vdi.ErrIO, scsi.StatusCheck, scsi.InternalFailure, pdu.LoginTargetError},
	{vdi.ErrReadOnly, scsi.StatusCheck, scsi.WriteProtected, pdu.LoginTargetError},
	{vdi.ErrLocked, scsi.StatusCheck, scsi.WriteProtected, pdu.LoginForbidden},
	{vdi.ErrBusy, scsi.StatusBusy, scsi.Code{}, pdu.LoginUnavailable},
	{vdi.ErrStale, scsi.StatusBusy, scsi.Code{}, pdu.LoginUnavailable},
	{vdi.ErrUnavailable, scsi.StatusCheck, scsi.NotReadyBecoming, pdu.LoginUnavailable},
	{vdi.ErrUnsupported, scsi.StatusCheck, scsi.InvalidCommand, pdu.LoginTargetError},
	{vdi.ErrClosed, scsi.StatusBusy, scsi.Code{}, pdu.LoginUnavailable},
	{context.Canceled, scsi.StatusBusy, scsi.Code{}, pdu.LoginUnavailable},
	{context.DeadlineExceeded, scsi.StatusBusy, scsi.Code{}, pdu.LoginUnavailable},
}

// outcomeOf gives how a command ends that failed with err.
func outcomeOf(err error, writes bool) scsi.Outcome {
	var conflict *conflictError
	if errors.As(err, &conflict) {
		return scsi.Outcome{Status: scsi.StatusConflict}
	}
	var told *senseError
	if errors.As(err, &told) {
		return scsi.Outcome{Status: scsi.StatusCheck, Sense: told.sense}
	}
	for _, r := range results {
		if errors.Is(err, r.kind) {
			return scsi.Outcome{Status: r.status, Sense: scsi.Sense{Code: r.code}}
		}
	}
	if writes {
		return scsi.Outcome{Status: scsi.StatusCheck, Sense: scsi.Sense{Code: scsi.WriteError}}
	}
	return scsi.Outcome{Status: scsi.StatusCheck, Sense: scsi.Sense{Code: scsi.UnrecoveredRead}}
}

// loginStatusOf gives how a login ends that failed with err.
func loginStatusOf(err error) pdu.LoginStatus {
	var refused *admitError
	if errors.As(err, &refused) {
		return refused.status
	}
	for _, r := range results {
		if errors.Is(err, r.kind) {
			return r.login
		}
	}
	return pdu.LoginTargetError
}

func notFound(target string) error {
	return fmt.Errorf("no target %q: %w; \"dog vdi list\" shows the volumes there are", target, vdi.ErrNotFound)
}

// senseError is a failure that SCSI has words of its own for.
type senseError struct{ sense scsi.Sense }

func (e *senseError) Error() string { return "command was refused" }

func told(s scsi.Sense) error { return &senseError{s} }

// Why a session ends by our doing.
var (
	errProtocol   = errors.New("initiator violated the protocol")
	errDigest     = errors.New("header digest is wrong")
	errLogout     = errors.New("initiator logged out")
	errReplaced   = errors.New("initiator logged in anew")
	errSilent     = errors.New("initiator does not answer")
	errReset      = errors.New("target was reset")
	errKicked     = errors.New("an operator ended it")
	errGone       = errors.New("the volume is gone")
	errLoginEnded = errors.New("login failed")
)
