package scsi

import (
	"encoding/binary"
	"slices"
)

// State is how a target port group reaches a unit (SPC-4 section 5.15.2.4).
type State byte

// States of target port groups.
const (
	ActiveOptimized    State = 0x0
	ActiveNonOptimized State = 0x1
	Unavailable        State = 0x3
)

// Group is a target port group: a gateway, which has one port.
type Group struct {
	ID    uint16
	State State
}

func planGroups(u *Unit, cdb []byte) Plan {
	const (
		extended  = 1 << 5
		optimized = 0x01
		nonOpt    = 0x02
		unavail   = 0x08
		implicit  = 0x02 // the state was changed by the target
	)
	var b []byte
	switch cdb[1] >> 5 {
	case 0:
		b = make([]byte, 4)
	case 1:
		b = make([]byte, 8)
		b[4] = 0x10 // extended header; no implicit transition time is told
	default:
		return badField(1)
	}
	for _, g := range u.Groups {
		d := make([]byte, 12)
		d[0], d[1] = byte(g.State), optimized|nonOpt|unavail
		binary.BigEndian.PutUint16(d[2:], g.ID)
		d[5], d[7] = implicit, 1
		binary.BigEndian.PutUint16(d[10:], g.ID)
		b = append(b, d...)
	}
	binary.BigEndian.PutUint32(b, uint32(len(b)-4))
	return answer(b, int64(binary.BigEndian.Uint32(cdb[6:])))
}

func planSetGroups(_ *Unit, cdb []byte) Plan {
	return Plan{Kind: SetGroups, DataOut: int64(binary.BigEndian.Uint32(cdb[6:]))}
}

// WantedGroup reads the parameters of SET TARGET PORT GROUPS: take is whether this gateway's
// group shall become optimized. Who owns a volume is the optimized one, so that is the only
// change there is to ask for; what is the case already is no change.
func WantedGroup(u *Unit, b []byte) (take bool, sense Sense) {
	if len(b) == 0 {
		return false, Sense{}
	}
	if len(b) < 4 || (len(b)-4)%4 != 0 {
		return false, Sense{Code: ParameterListLength}
	}
	for at := 4; at < len(b); at += 4 {
		bad := Sense{Code: InvalidFieldInParameter, Field: uint16(at), HasField: true}
		id, state := binary.BigEndian.Uint16(b[at+2:]), State(b[at]&0x0f)
		i := slices.IndexFunc(u.Groups, func(g Group) bool { return g.ID == id })
		switch {
		case i < 0:
			bad.Field += 2
			return false, bad
		case u.Groups[i].State == state:
		case state == ActiveOptimized && id == u.Group:
			take = true
		case state == ActiveNonOptimized: // follows from another one being optimized
		default:
			return false, bad
		}
	}
	return take, Sense{}
}
