package scsi

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"slices"
)

// Service actions of PERSISTENT RESERVE IN.
const (
	prReadKeys        = 0x00
	prReadReservation = 0x01
	prCapabilities    = 0x02
	prFullStatus      = 0x03
)

// Service actions of PERSISTENT RESERVE OUT.
const (
	prRegister       = 0x00
	prReserve        = 0x01
	prRelease        = 0x02
	prClear          = 0x03
	prPreempt        = 0x04
	prPreemptAbort   = 0x05
	prRegisterIgnore = 0x06
)

// Types of persistent reservations.
const (
	WriteExclusive               = 1
	ExclusiveAccess              = 3
	WriteExclusiveRegistrants    = 5 // registrants only
	ExclusiveAccessRegistrants   = 6
	WriteExclusiveAllRegistrants = 7
	ExclusiveAccessAll           = 8 // all registrants
)

// Nexus is an initiator port that reaches a target port: who reservations are for.
type Nexus struct {
	Port  string `json:"port"`  // NAME,i,0xISID
	Group uint16 `json:"group"` // of the target port
	// Place is the target's, of a group: its port is another one than that of the VDI's own target, and initiators may have
	// the same ISID with both.
	Place string `json:"place,omitempty"`
}

// Registration is a key that a nexus gave.
type Registration struct {
	Nexus
	Key uint64 `json:"key"`
}

// Holder has a persistent reservation; of an all registrants type it is every registrant.
type Holder struct {
	Nexus
	Type byte `json:"type"`
}

// Reservations are the state of a unit's reservations. Values are copies: methods that change
// something return a new one.
type Reservations struct {
	Generation uint32         `json:"generation"`
	Persist    bool           `json:"persist,omitempty"` // APTPL
	Keys       []Registration `json:"keys,omitempty"`
	Holder     *Holder        `json:"holder,omitempty"`
	// Legacy is who has the unit by RESERVE(6), and through which gateway.
	Legacy *Legacy `json:"legacy,omitempty"`
	// Events are the last ones, the newest at the end.
	Events []Event `json:"events,omitempty"`
}

// Event is something done through one gateway that ends commands at others, too.
type Event struct {
	Serial uint64    `json:"serial"` // counts them
	Node   string    `json:"node"`   // the gateway
	Kind   EventKind `json:"kind"`
	Nexus  []Nexus   `json:"nexus,omitempty"` // Aborted: whose commands
}

// EventKind says what was done.
type EventKind string

// Kinds of events.
const (
	Reset   EventKind = "reset"   // of the unit
	Cold    EventKind = "cold"    // and all sessions end
	Cleared EventKind = "cleared" // the task set
	Aborted EventKind = "aborted" // the commands of some
)

// maxEvents bounds the events that are kept. A gateway that has missed more takes it for a reset.
const maxEvents = 8

// Add adds an event.
func (r *Reservations) Add(e Event) {
	e.Serial = r.Serial() + 1
	r.Events = append(slices.Clone(r.Events[max(0, len(r.Events)+1-maxEvents):]), e)
}

// Serial is that of the newest event.
func (r *Reservations) Serial() uint64 {
	if len(r.Events) == 0 {
		return 0
	}
	return r.Events[len(r.Events)-1].Serial
}

// Since lists the events after one, but for those of a gateway itself.
func (r *Reservations) Since(serial uint64, self string) (list []Event) {
	if len(r.Events) > 0 && r.Events[0].Serial > serial+1 {
		list = append(list, Event{Serial: r.Events[0].Serial - 1, Kind: Reset})
	}
	for _, e := range r.Events {
		if e.Serial > serial && e.Node != self {
			list = append(list, e)
		}
	}
	return list
}

// Legacy is a reservation that ends with its session.
type Legacy struct {
	Nexus
	Node string `json:"node"`
	Life uint64 `json:"life,omitempty"` // which start of the gateway
}

// MaxRegistrations bounds the registrations of a unit.
const MaxRegistrations = 256

// DecodeReservations reads what Encode wrote; "" is none.
func DecodeReservations(s string) (r Reservations, err error) {
	if s == "" {
		return r, nil
	}
	if err := json.Unmarshal([]byte(s), &r); err != nil {
		return r, fmt.Errorf("decode reservations: %w", err)
	}
	return r, nil
}

// Encode gives the state as a text, "" for none.
func (r *Reservations) Encode() string {
	if r.Generation == 0 && len(r.Keys) == 0 && r.Holder == nil && r.Legacy == nil && len(r.Events) == 0 {
		return ""
	}
	b, err := json.Marshal(r)
	if err != nil {
		panic(fmt.Sprintf("encode reservations: %v", err)) // a struct of numbers and strings
	}
	return string(b)
}

func (r *Reservations) keyOf(n Nexus) (uint64, bool) {
	i := slices.IndexFunc(r.Keys, func(x Registration) bool { return x.Nexus == n })
	if i < 0 {
		return 0, false
	}
	return r.Keys[i].Key, true
}

func allRegistrants(t byte) bool {
	return t == WriteExclusiveAllRegistrants || t == ExclusiveAccessAll
}

// registrantsOnly reports whether the reservation gives something to all who are registered.
func registrantsOnly(t byte) bool {
	return t == WriteExclusiveRegistrants || t == ExclusiveAccessRegistrants || allRegistrants(t)
}

func validType(t byte) bool {
	return slices.Contains([]byte{WriteExclusive, ExclusiveAccess, WriteExclusiveRegistrants, ExclusiveAccessRegistrants, WriteExclusiveAllRegistrants, ExclusiveAccessAll}, t)
}

func (r *Reservations) holds(n Nexus) bool {
	if r.Holder == nil {
		return false
	}
	if allRegistrants(r.Holder.Type) {
		_, ok := r.keyOf(n)
		return ok
	}
	return r.Holder.Nexus == n
}

// Conflicts reports whether the reservations keep a nexus from a command.
func (r *Reservations) Conflicts(n Nexus, p *Plan) bool {
	c := p.Command
	if l := r.Legacy; l != nil && l.Nexus != n {
		return !c.Quiet && p.Kind != Release && !(p.Kind == Prevent && p.CDB[4] == 0)
	}
	if p.Kind == Reserve || p.Kind == Release {
		return len(r.Keys) > 0 // CRH is 0: the old ones and the persistent ones exclude each other
	}
	if r.Holder == nil || r.holds(n) {
		return false
	}
	if _, ok := r.keyOf(n); ok && registrantsOnly(r.Holder.Type) {
		return false
	}
	exclusive := r.Holder.Type == ExclusiveAccess || r.Holder.Type == ExclusiveAccessRegistrants || r.Holder.Type == ExclusiveAccessAll
	switch c.Access {
	case AccessRead:
		return exclusive
	case AccessWrite:
		return true
	case AccessOwn:
		return p.Kind == Prevent && p.CDB[4] != 0
	}
	return false
}

func planReserveIn(_ *Unit, cdb []byte) Plan {
	return Plan{Kind: ReserveIn, Limit: int64(binary.BigEndian.Uint16(cdb[7:]))}
}

const parameterSize = 24

func planReserveOut(_ *Unit, cdb []byte) Plan {
	n := int64(binary.BigEndian.Uint32(cdb[5:]))
	if n != parameterSize {
		return refuse(ParameterListLength) // SPEC_I_PT, which would make it longer, is not supported
	}
	return Plan{Kind: ReserveOut, DataOut: n}
}

// In answers PERSISTENT RESERVE IN.
func (r *Reservations) In(action byte) []byte {
	b := make([]byte, 8)
	binary.BigEndian.PutUint32(b, r.Generation)
	switch action {
	case prReadKeys:
		for _, x := range r.Keys {
			b = binary.BigEndian.AppendUint64(b, x.Key)
		}
	case prReadReservation:
		if r.Holder != nil {
			key := uint64(0)
			if !allRegistrants(r.Holder.Type) {
				key, _ = r.keyOf(r.Holder.Nexus)
			}
			b = binary.BigEndian.AppendUint64(b, key)
			b = append(b, 0, 0, 0, 0, 0, r.Holder.Type, 0, 0)
		}
	case prCapabilities:
		return r.capabilities()
	case prFullStatus:
		for _, x := range r.Keys {
			b = append(b, r.fullStatus(x)...)
		}
	}
	binary.BigEndian.PutUint32(b[4:], uint32(len(b)-8))
	return b
}

func (r *Reservations) capabilities() []byte {
	const canPersist, maskValid, active = 0x01, 0x80, 0x01
	b := []byte{0, 8, canPersist, maskValid, 0xea, 0x01, 0, 0}
	if r.Persist {
		b[3] |= active
	}
	return b
}

func (r *Reservations) fullStatus(x Registration) []byte {
	b := make([]byte, 24)
	binary.BigEndian.PutUint64(b, x.Key)
	if r.holds(x.Nexus) {
		b[12], b[13] = 1, r.Holder.Type
	}
	binary.BigEndian.PutUint16(b[18:], x.Group)
	id := transportID(x.Port)
	binary.BigEndian.PutUint32(b[20:], uint32(len(id)))
	return append(b, id...)
}

// transportID names an initiator port (SPC-4 section 7.6.4.6).
func transportID(port string) []byte {
	const withISID, iscsi, least = 0x40, 5, 20
	s := name(port)
	for len(s) < least {
		s = append(s, 0)
	}
	b := []byte{withISID | iscsi, 0, 0, 0}
	binary.BigEndian.PutUint16(b[2:], uint16(len(s)))
	return append(b, s...)
}

// Effect is what a change of reservations means for other initiators.
type Effect struct {
	Tell  []Told  // unit attentions
	Abort []Nexus // whose commands are to be aborted
	// Takes is set if somebody may do less than before: what is under way must not land
	// after the answer.
	Takes bool
}

// Told is a unit attention for a nexus.
type Told struct {
	Nexus
	Code Code
}

// Outcome is a status, with sense data if it is StatusCheck.
type Outcome struct {
	Status Status
	Sense  Sense
}

func good() Outcome     { return Outcome{Status: StatusGood} }
func conflict() Outcome { return Outcome{Status: StatusConflict} }
func check(s Sense) Outcome {
	return Outcome{Status: StatusCheck, Sense: s}
}

// Out carries out PERSISTENT RESERVE OUT for a nexus. It returns the state afterwards,
// which is r if the outcome is not good.
func (r Reservations) Out(n Nexus, p *Plan, b []byte) (Reservations, Effect, Outcome) {
	if len(b) != parameterSize {
		return r, Effect{}, check(Sense{Code: ParameterListLength})
	}
	key, newKey, flags := binary.BigEndian.Uint64(b), binary.BigEndian.Uint64(b[8:]), b[20]
	action, scope, kind := p.Action(), p.CDB[2]>>4, p.CDB[2]&0x0f
	const specI, allPorts, persist = 0x08, 0x04, 0x01
	if flags&(specI|allPorts) != 0 {
		return r, Effect{}, check(Sense{Code: InvalidFieldInParameter, Field: 20, HasField: true})
	}
	next := r
	next.Keys = slices.Clone(r.Keys)
	own, registered := r.keyOf(n)
	if action == prRegister || action == prRegisterIgnore {
		e, o := next.register(n, action == prRegisterIgnore, key, newKey, flags&persist != 0)
		return next, e, o
	}
	if !registered || own != key {
		return r, Effect{}, conflict()
	}
	if action != prClear && (scope != 0 || !validType(kind)) {
		return r, Effect{}, Outcome{StatusCheck, Sense{Code: InvalidFieldInCDB, Field: 2, HasField: true, InCommand: true}}
	}
	var e Effect
	o := good()
	switch action {
	case prReserve:
		e, o = next.reserve(n, kind)
	case prRelease:
		e, o = next.release(n, kind)
	case prClear:
		e = next.clear(n)
	case prPreempt, prPreemptAbort:
		e, o = next.preempt(n, newKey, kind, action == prPreemptAbort)
	}
	if o.Status != StatusGood {
		return r, Effect{}, o
	}
	return next, e, o
}

func (r *Reservations) register(n Nexus, ignore bool, key, newKey uint64, persist bool) (Effect, Outcome) {
	own, registered := r.keyOf(n)
	switch {
	case !ignore && own != key: // of who is not registered, own is 0
		return Effect{}, conflict()
	case !registered && newKey == 0:
		return Effect{}, good()
	case !registered && len(r.Keys) >= MaxRegistrations:
		return Effect{}, check(Sense{Code: InsufficientRegistry})
	}
	var e Effect
	r.Generation++
	r.Persist = persist
	switch {
	case newKey == 0:
		e = r.unregister(n)
	case registered:
		i := slices.IndexFunc(r.Keys, func(x Registration) bool { return x.Nexus == n })
		r.Keys[i].Key = newKey
	default:
		r.Keys = append(r.Keys, Registration{n, newKey})
	}
	return e, good()
}

// unregister removes a registration; the reservation goes with its holder, or with the last
// of all registrants.
func (r *Reservations) unregister(n Nexus) (e Effect) {
	held := r.holds(n)
	e.Takes = r.Holder != nil
	r.remove(func(x Registration) bool { return x.Nexus == n })
	if !held || allRegistrants(r.Holder.Type) && len(r.Keys) > 0 {
		return e
	}
	if registrantsOnly(r.Holder.Type) {
		e.tell(r.Keys, ReservationReleased, n)
	}
	r.Holder = nil
	return e
}

func (r *Reservations) remove(which func(Registration) bool) (gone []Nexus) {
	r.Keys = slices.DeleteFunc(r.Keys, func(x Registration) bool {
		if which(x) {
			gone = append(gone, x.Nexus)
			return true
		}
		return false
	})
	return gone
}

func (e *Effect) tell(list []Registration, c Code, but Nexus) {
	for _, x := range list {
		if x.Nexus != but {
			e.Tell = append(e.Tell, Told{x.Nexus, c})
		}
	}
}

func (r *Reservations) reserve(n Nexus, kind byte) (Effect, Outcome) {
	if h := r.Holder; h != nil {
		if r.holds(n) && h.Type == kind {
			return Effect{}, good()
		}
		return Effect{}, conflict()
	}
	r.Holder = &Holder{n, kind}
	return Effect{Takes: true}, good()
}

func (r *Reservations) release(n Nexus, kind byte) (e Effect, o Outcome) {
	switch {
	case r.Holder == nil || !r.holds(n):
		return e, good()
	case r.Holder.Type != kind:
		return e, check(Sense{Code: InvalidRelease})
	}
	if registrantsOnly(kind) {
		e.tell(r.Keys, ReservationReleased, n)
	}
	r.Holder = nil
	return e, good()
}

func (r *Reservations) clear(n Nexus) (e Effect) {
	e.tell(r.Keys, ReservationPreempted, n)
	r.Generation++
	r.Keys, r.Holder = nil, nil
	return e
}

func (r *Reservations) preempt(n Nexus, victim uint64, kind byte, abort bool) (e Effect, o Outcome) {
	h := r.Holder
	all := h != nil && allRegistrants(h.Type)
	if victim == 0 && !all {
		return e, check(Sense{Code: InvalidFieldInParameter, Field: 8, HasField: true})
	}
	var holderKey uint64
	if h != nil && !all {
		holderKey, _ = r.keyOf(h.Nexus)
	}
	takes := h != nil && (all && victim == 0 || !all && holderKey == victim)
	matches := func(x Registration) bool { return x.Key == victim || all && victim == 0 }
	if !takes && !slices.ContainsFunc(r.Keys, matches) {
		return e, conflict()
	}
	gone := r.remove(func(x Registration) bool { return x.Nexus != n && matches(x) })
	for _, g := range gone {
		e.Tell = append(e.Tell, Told{g, RegistrationGone})
	}
	if takes {
		if h.Type != kind {
			e.tell(r.Keys, ReservationReleased, n)
		}
		r.Holder = &Holder{n, kind}
	}
	if abort {
		e.Abort = gone
	}
	e.Takes = true
	r.Generation++
	return e, good()
}

// Forget removes what ends with a session: the old kind of reservation.
func (r Reservations) Forget(n Nexus) (Reservations, bool) {
	if r.Legacy == nil || r.Legacy.Nexus != n {
		return r, false
	}
	r.Legacy = nil
	return r, true
}

// News is what a nexus is to be told when r follows on before by somebody else's doing.
func (r *Reservations) News(before *Reservations, n Nexus) (Code, bool) {
	_, was := before.keyOf(n)
	_, is := r.keyOf(n)
	switch {
	case was && !is && len(r.Keys) == 0 && r.Holder == nil:
		return ReservationPreempted, true // CLEAR, or all were preempted
	case was && !is:
		return RegistrationGone, true
	case is && before.Holder != nil && registrantsOnly(before.Holder.Type) && r.Holder == nil:
		return ReservationReleased, true
	}
	return Code{}, false
}
