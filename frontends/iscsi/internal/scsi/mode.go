package scsi

import "encoding/binary"

// Page controls of MODE SENSE.
const (
	pageCurrent    = 0
	pageChangeable = 1
	pageDefault    = 2
	pageSaved      = 3
)

const (
	allPages    = 0x3f
	allSubpages = 0xff
)

const (
	bitDescriptors = 0x04 // D_SENSE, in byte 2 of the control page
	bitProtect     = 0x08 // SWP, in byte 4 of the control page
)

// modePage is one page: its bytes when everything is as at the start, and which bits MODE
// SELECT may change.
type modePage struct {
	code       byte
	size       int
	defaults   map[int]byte
	changeable map[int]byte
}

// modePages are all there are, by code.
var modePages = []modePage{
	{code: 0x01, size: 12, defaults: map[int]byte{2: 0xc0}},                                                             // read-write error recovery: AWRE, ARRE
	{code: 0x08, size: 20, defaults: map[int]byte{2: 0x04}},                                                             // caching: WCE
	{code: 0x0a, size: 12, defaults: map[int]byte{3: 0x10}, changeable: map[int]byte{2: bitDescriptors, 4: bitProtect}}, // control: unrestricted reordering
	{code: 0x1c, size: 12, defaults: map[int]byte{2: 0x08}},                                                             // informational exceptions: DEXCPT
}

const controlPage = 0x0a

// encode gives the page for a page control.
func (p *modePage) encode(u *Unit, control byte) []byte {
	b := make([]byte, p.size)
	b[0], b[1] = p.code, byte(p.size-2)
	values := p.defaults
	if control == pageChangeable {
		values = p.changeable
	}
	for at, v := range values {
		b[at] = v
	}
	if p.code == controlPage && control == pageCurrent {
		if u.Descriptor {
			b[2] |= bitDescriptors
		}
		if u.Protected {
			b[4] |= bitProtect
		}
	}
	return b
}

func planSense6(u *Unit, cdb []byte) Plan {
	pages, bad := u.pagesFor(cdb)
	if bad != nil {
		return *bad
	}
	desc := u.blockDescriptor(cdb[1]&8 != 0, false)
	b := []byte{byte(3 + len(desc) + len(pages)), 0, u.deviceParameter(), byte(len(desc))}
	return answer(append(append(b, desc...), pages...), int64(cdb[4]))
}

func planSense10(u *Unit, cdb []byte) Plan {
	pages, bad := u.pagesFor(cdb)
	if bad != nil {
		return *bad
	}
	long := cdb[1]&0x10 != 0 // LLBAA
	desc := u.blockDescriptor(cdb[1]&8 != 0, long)
	b := make([]byte, 8)
	binary.BigEndian.PutUint16(b, uint16(6+len(desc)+len(pages)))
	b[3] = u.deviceParameter()
	if long && len(desc) > 0 {
		b[4] = 1
	}
	binary.BigEndian.PutUint16(b[6:], uint16(len(desc)))
	return answer(append(append(b, desc...), pages...), int64(binary.BigEndian.Uint16(cdb[7:])))
}

// deviceParameter: FUA and DPO are known; whether the unit is write protected.
func (u *Unit) deviceParameter() byte {
	const dpofua, protected = 0x10, 0x80
	if u.ReadOnly || u.Protected {
		return dpofua | protected
	}
	return dpofua
}

func (u *Unit) blockDescriptor(disabled, long bool) []byte {
	if disabled {
		return nil
	}
	if long {
		b := make([]byte, 16)
		binary.BigEndian.PutUint64(b, u.Blocks)
		binary.BigEndian.PutUint32(b[12:], 1<<u.BlockShift)
		return b
	}
	b := make([]byte, 8)
	binary.BigEndian.PutUint32(b, uint32(min(u.Blocks, 0xffffffff)))
	binary.BigEndian.PutUint32(b[4:], 1<<u.BlockShift) // below 2^24
	return b
}

func (u *Unit) pagesFor(cdb []byte) ([]byte, *Plan) {
	control, code, sub := cdb[2]>>6, cdb[2]&0x3f, cdb[3]
	if control == pageSaved {
		p := refuse(Code{KeyIllegalRequest, 0x39, 0x00}) // saving parameters not supported
		return nil, &p
	}
	if sub != 0 && (sub != allSubpages || code != allPages) && sub != allSubpages {
		p := badField(3)
		return nil, &p
	}
	var b []byte
	for i := range modePages {
		if p := &modePages[i]; p.code == code || code == allPages {
			b = append(b, p.encode(u, control)...)
		}
	}
	if b == nil {
		p := badField(2)
		return nil, &p
	}
	return b, nil
}

func planSelect6(_ *Unit, cdb []byte) Plan { return planSelect(cdb[1], int64(cdb[4])) }

func planSelect10(_ *Unit, cdb []byte) Plan {
	return planSelect(cdb[1], int64(binary.BigEndian.Uint16(cdb[7:])))
}

func planSelect(flags byte, n int64) Plan {
	const save, format = 0x01, 0x10
	if flags&save != 0 { // nothing can be saved
		return badField(1)
	}
	if flags&format == 0 && n > 0 {
		return badField(1)
	}
	return Plan{Kind: SelectMode, DataOut: n}
}

// Modes are what MODE SELECT can change.
type Modes struct{ Protected, Descriptor bool }

// Select reads the parameters of MODE SELECT and gives the new modes; sense is why they
// are refused.
func Select(u *Unit, ten bool, b []byte) (m Modes, sense Sense) {
	m = Modes{u.Protected, u.Descriptor}
	if len(b) == 0 {
		return m, Sense{}
	}
	header, desc := 4, 0
	switch {
	case ten && len(b) >= 8:
		header, desc = 8, int(binary.BigEndian.Uint16(b[6:]))
	case !ten && len(b) >= 4:
		desc = int(b[3])
	default:
		return m, Sense{Code: ParameterListLength}
	}
	if header+desc > len(b) {
		return m, Sense{Code: ParameterListLength}
	}
	at := header + desc
	for b = b[at:]; len(b) > 0; {
		n, s := u.selectPage(&m, b, at)
		if s != (Sense{}) {
			return m, s
		}
		b, at = b[n:], at+n
	}
	return m, Sense{}
}

// selectPage takes the page that b begins with, which lies at the given place, and returns its length.
func (u *Unit) selectPage(m *Modes, b []byte, at int) (int, Sense) {
	bad := func(i int) (int, Sense) {
		return 0, Sense{Code: InvalidFieldInParameter, Field: uint16(at + i), HasField: true}
	}
	if len(b) < 2 {
		return 0, Sense{Code: ParameterListLength}
	}
	for i := range modePages {
		p := &modePages[i]
		if b[0]&0x7f != p.code { // PS is reserved in MODE SELECT, and often copied from MODE SENSE
			continue
		}
		if int(b[1]) != p.size-2 {
			return bad(1)
		}
		if len(b) < p.size {
			return 0, Sense{Code: ParameterListLength}
		}
		current := p.encode(u, pageCurrent)
		for j := 2; j < p.size; j++ {
			if (b[j]^current[j])&^p.changeable[j] != 0 {
				return bad(j)
			}
		}
		if p.code == controlPage {
			m.Descriptor, m.Protected = b[2]&bitDescriptors != 0, b[4]&bitProtect != 0
		}
		return p.size, Sense{}
	}
	return bad(0)
}
