package scsi

import "encoding/binary"

// Reporting options of REPORT SUPPORTED OPERATION CODES.
const (
	reportAll    = 0
	reportCode   = 1
	reportAction = 2
	reportEither = 3
)

const (
	timeoutSize  = 12
	bitTimeouts  = 0x80 // RCTD
	flagTimeouts = 0x02 // CTDP, with all commands
	flagAction   = 0x01 // SERVACTV
)

func planOpcodes(*Unit, []byte) Plan { return Plan{Kind: listCommands} }

// reportCommands reads the table that planOpcodes is itself in.
func reportCommands(cdb []byte) Plan {
	limit := int64(binary.BigEndian.Uint32(cdb[6:]))
	timeouts := cdb[2]&bitTimeouts != 0
	switch option := cdb[2] & 7; option {
	case reportAll:
		return answer(everyOpcode(timeouts), limit)
	case reportCode, reportAction, reportEither:
		return oneOpcode(option, cdb[3], int(binary.BigEndian.Uint16(cdb[4:])), timeouts, limit)
	}
	return badField(2)
}

func everyOpcode(timeouts bool) []byte {
	b := make([]byte, 4)
	for _, c := range commands {
		var d [8]byte
		d[0] = c.op
		if c.action != noAction {
			binary.BigEndian.PutUint16(d[2:], uint16(c.action))
			d[5] |= flagAction
		}
		binary.BigEndian.PutUint16(d[6:], uint16(len(c.usage)))
		if timeouts {
			d[5] |= flagTimeouts
		}
		b = append(b, d[:]...)
		if timeouts {
			b = append(b, timeoutDescriptor()...)
		}
	}
	binary.BigEndian.PutUint32(b, uint32(len(b)-4))
	return b
}

// timeoutDescriptor says that there are no times to tell.
func timeoutDescriptor() []byte {
	b := make([]byte, timeoutSize)
	binary.BigEndian.PutUint16(b, timeoutSize-2)
	return b
}

func oneOpcode(option, op byte, action int, timeouts bool, limit int64) Plan {
	var found *Command
	for _, c := range commands {
		if c.op != op {
			continue
		}
		switch {
		case option == reportCode && c.action != noAction:
			return badField(4)
		case option == reportAction && c.action == noAction:
			return badField(4)
		case c.action == noAction && (option != reportEither || action == 0), c.action == action:
			found = c
		}
	}
	const supported, unsupported, withTimeouts = 3, 1, 0x80
	b := make([]byte, 4)
	if found == nil {
		b[1] = unsupported
		return answer(b, limit)
	}
	b[1] = supported
	binary.BigEndian.PutUint16(b[2:], uint16(len(found.usage)))
	b = append(b, found.usage...)
	if timeouts {
		b[1] |= withTimeouts
		b = append(b, timeoutDescriptor()...)
	}
	return answer(b, limit)
}

// planFunctions: abort task, abort task set, clear task set, LUN reset, target resets.
func planFunctions(_ *Unit, cdb []byte) Plan {
	const abortTask, abortSet, clearSet, lunReset, warmReset, coldReset = 0x80, 0x40, 0x10, 0x08, 0x02, 0x04
	b := make([]byte, 4, 16)
	b[0] = abortTask | abortSet | clearSet | lunReset | warmReset | coldReset
	if cdb[2]&0x80 != 0 { // REPD
		b = b[:16]
		b[3] = 12
	}
	limit := int64(binary.BigEndian.Uint32(cdb[6:]))
	if limit < 4 {
		return badField(6)
	}
	return answer(b, limit)
}
