package nbd

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/dustin/go-humanize"

	"sheepdog/frontends/internal/listen"
	"sheepdog/frontends/nbd/internal/wire"
	"sheepdog/vdi"
)

// snapshotMark separates a VDI's name from a snapshot's tag in an export name.
const snapshotMark = "@"

// exportName is the name by which clients ask for a VDI or a snapshot.
func exportName(name, tag string) string {
	if tag == "" {
		return name
	}
	return name + snapshotMark + tag
}

// splits returns what an export name may mean, likeliest first: a VDI, or a snapshot
// of one. A name of a VDI may have an @ of its own, so the whole name goes first.
func splits(export string) [][2]string {
	list := [][2]string{{export, ""}}
	if i := strings.LastIndex(export, snapshotMark); i > 0 && i+1 < len(export) {
		list = append(list, [2]string{export[:i], export[i+1:]})
	}
	return list
}

// resolve calls try with what an export name may mean until it finds something.
func resolve(export string, try func(name, tag string) error) error {
	if export == "" {
		return fmt.Errorf("%w: %w", vdi.ErrNotFound, errNoDefault)
	}
	for _, p := range splits(export) {
		if err := try(p[0], p[1]); !errors.Is(err, vdi.ErrNotFound) {
			return err
		}
	}
	return fmt.Errorf(`no export %q: %w; "dog vdi list" shows what there is`, export, vdi.ErrNotFound)
}

func (n *negotiation) open(ctx context.Context, export string) (v Volume, err error) {
	client := "nbd " + listen.PeerName(n.conn)
	err = resolve(export, func(name, tag string) error {
		v, err = n.server.cfg.Volumes.Open(ctx, name, tag, client)
		return err
	})
	return v, err
}

// transmissionFlags of an export, given what was negotiated.
func (n *negotiation) transmissionFlags(v Volume, contexts []metaContext) uint16 {
	f := uint16(wire.NBD_FLAG_HAS_FLAGS | wire.NBD_FLAG_SEND_FLUSH | wire.NBD_FLAG_SEND_FUA | wire.NBD_FLAG_SEND_CACHE | wire.NBD_FLAG_CAN_MULTI_CONN)
	if v.ReadOnly() {
		f |= wire.NBD_FLAG_READ_ONLY
	} else {
		f |= wire.NBD_FLAG_SEND_TRIM | wire.NBD_FLAG_SEND_WRITE_ZEROES | wire.NBD_FLAG_SEND_FAST_ZERO
	}
	if n.headers != wire.Simple {
		f |= wire.NBD_FLAG_SEND_DF
	}
	if n.headers == wire.Extended && len(contexts) > 0 {
		f |= wire.NBD_FLAG_BLOCK_STATUS_PAYLOAD
	}
	return f
}

// contextsOf returns the contexts that hold for an export: those of another are void.
func (n *negotiation) contextsOf(export string) []metaContext {
	if n.contextsFor == export {
		return n.contexts
	}
	return nil
}

// optExportName has no way to report an error: a failure ends the connection.
func (n *negotiation) optExportName(ctx context.Context, _ uint32, data []byte) (bool, error) {
	if n.server.cfg.TLSRequired && !n.tls {
		return false, fmt.Errorf("%w: NBD_OPT_EXPORT_NAME before TLS", errProtocol)
	}
	if n.headers == wire.Extended {
		return false, fmt.Errorf("%w: NBD_OPT_EXPORT_NAME after NBD_OPT_EXTENDED_HEADERS", errProtocol)
	}
	if err := wire.CheckString(data); err != nil {
		return false, fmt.Errorf("%w: export name: %v", errProtocol, err)
	}
	export := string(data)
	v, err := n.open(ctx, export)
	if err != nil {
		return false, err
	}
	contexts := n.contextsOf(export)
	n.out = wire.AppendExportName(n.out, uint64(v.Size()), n.transmissionFlags(v, contexts), n.noZeroes)
	return n.chosen(v, export, contexts)
}

// chosen sends the answer that begins the transmission phase.
func (n *negotiation) chosen(v Volume, export string, contexts []metaContext) (bool, error) {
	if err := n.flush(); err != nil {
		return false, errors.Join(err, v.Close())
	}
	n.volume, n.export, n.selected = v, export, contexts
	return true, nil
}

// optInfo answers NBD_OPT_INFO and NBD_OPT_GO.
func (n *negotiation) optInfo(ctx context.Context, option uint32, data []byte) (bool, error) {
	q, err := wire.ParseInfoRequest(data)
	if err != nil {
		return false, n.fail(option, wire.NBD_REP_ERR_INVALID, err.Error())
	}
	v, err := n.open(ctx, q.Name)
	if err != nil {
		return false, n.fail(option, optionResultOf(err), err.Error())
	}
	contexts := n.contextsOf(q.Name)
	n.out = wire.AppendInfoExport(n.out, option, uint64(v.Size()), n.transmissionFlags(v, contexts))
	if q.Wants(wire.NBD_INFO_NAME) {
		n.out = wire.AppendInfoString(n.out, option, wire.NBD_INFO_NAME, q.Name)
	}
	if q.Wants(wire.NBD_INFO_DESCRIPTION) {
		n.out = wire.AppendInfoString(n.out, option, wire.NBD_INFO_DESCRIPTION, describeExport(q.Name, v.Size(), v.ReadOnly()))
	}
	if q.Wants(wire.NBD_INFO_BLOCK_SIZE) {
		n.out = wire.AppendInfoBlockSize(n.out, option, minBlock, preferredBlock, MaxPayload)
	}
	n.out = wire.AppendOptionReply(n.out, option, wire.NBD_REP_ACK, nil)
	if option == wire.NBD_OPT_GO {
		return n.chosen(v, q.Name, contexts)
	}
	if err := v.Close(); err != nil {
		n.log.Warn("close of volume failed", "err", err)
	}
	if err := n.extend(); err != nil {
		return false, err
	}
	return false, n.flush()
}

// Block sizes of all exports, in bytes: any alignment is served; whole blocks of the
// store are served without reading first.
const (
	minBlock       = 1
	preferredBlock = 4096
)

func describeExport(name string, size int64, readOnly bool) string {
	kind := "VDI"
	if readOnly {
		kind = "read-only VDI or snapshot"
	}
	return kind + " " + wire.Truncate(name)[:min(len(name), 256)] + ", " + humanize.IBytes(uint64(size))
}

const (
	// maxListed bounds the exports of a list; more can be asked for by name.
	maxListed = 100_000
	// listPiece is what is collected of a list before it is sent, in bytes.
	listPiece = 64 << 10
)

// optList answers NBD_OPT_LIST with every VDI, each followed by its snapshots.
func (n *negotiation) optList(ctx context.Context, option uint32, data []byte) (bool, error) {
	if ok, err := n.empty(option, data); !ok {
		return false, err
	}
	list, err := n.server.cfg.Volumes.List(ctx)
	if err != nil {
		return false, n.fail(option, optionResultOf(err), err.Error())
	}
	for i, e := range list {
		if i == maxListed {
			return false, n.fail(option, wire.NBD_REP_ERR_TOO_BIG, fmt.Sprintf("there are %d exports, more than can be listed: ask for one by its name", len(list)))
		}
		name := exportName(e.Name, e.Tag)
		n.out = wire.AppendServer(n.out, name, describeExport(name, e.Size, e.ReadOnly))
		if len(n.out) >= listPiece {
			if err := n.flush(); err != nil {
				return false, err
			}
		}
	}
	return false, n.ack(option)
}
