package nbd

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"sheepdog/frontends/nbd/internal/wire"
)

// Names of metadata contexts. Queries are as QEMU's docs/interop/nbd.rst and the
// section "The base: metadata namespace" have them: a namespace alone, and
// qemu:dirty-bitmap: alone, list what is in there and select nothing.
const (
	contextBase       = "base:"
	contextAllocation = "base:allocation"
	contextQemu       = "qemu:"
	contextBitmap     = "qemu:dirty-bitmap:"
)

const (
	// maxContexts bounds the contexts that a client may select.
	maxContexts = 16
	// maxQueries bounds the queries of one option.
	maxQueries = 1024
	// allocationID is the id of base:allocation; bitmaps have the ids after it.
	allocationID = 1
)

// contextsFound are all contexts of an export.
func (n *negotiation) contextsFound(ctx context.Context, export string) ([]metaContext, error) {
	var tags []string
	err := resolve(export, func(name, tag string) (err error) {
		tags, err = n.server.cfg.Volumes.Snapshots(ctx, name, tag)
		return err
	})
	if err != nil {
		return nil, err
	}
	list := []metaContext{{id: allocationID, name: contextAllocation}}
	for i, tag := range tags {
		name := contextBitmap + tag
		if tag != "" && wire.CheckString([]byte(name)) == nil {
			list = append(list, metaContext{id: allocationID + 1 + uint32(i), name: name, since: tag})
		}
	}
	return list, nil
}

// lists reports whether a query of NBD_OPT_LIST_META_CONTEXT asks for a context.
func lists(query, name string) bool {
	switch query {
	case contextBase, contextQemu, contextBitmap:
		return strings.HasPrefix(name, query)
	}
	return query == name
}

// parseMeta decodes either option's data, and finds the export's contexts; ok is
// false if the option was answered with an error.
func (n *negotiation) parseMeta(ctx context.Context, option uint32, data []byte) (q wire.MetaRequest, all []metaContext, ok bool, err error) {
	if n.headers == wire.Simple {
		return q, nil, false, n.fail(option, wire.NBD_REP_ERR_INVALID, "metadata contexts need structured replies: negotiate them first")
	}
	q, err = wire.ParseMetaRequest(data)
	if err != nil {
		return q, nil, false, n.fail(option, wire.NBD_REP_ERR_INVALID, err.Error())
	}
	if len(q.Queries) > maxQueries {
		return q, nil, false, n.fail(option, wire.NBD_REP_ERR_TOO_BIG, fmt.Sprintf("%d queries: at most %d are taken", len(q.Queries), maxQueries))
	}
	for _, query := range q.Queries {
		if strings.Index(query, ":") < 1 {
			return q, nil, false, n.fail(option, wire.NBD_REP_ERR_INVALID, fmt.Sprintf("query %q has no namespace", query))
		}
	}
	all, err = n.contextsFound(ctx, q.Name)
	if err != nil {
		return q, nil, false, n.fail(option, optionResultOf(err), err.Error())
	}
	return q, all, true, nil
}

func (n *negotiation) optListMetaContext(ctx context.Context, option uint32, data []byte) (bool, error) {
	q, all, ok, err := n.parseMeta(ctx, option, data)
	if !ok {
		return false, err
	}
	for _, c := range all {
		if len(q.Queries) > 0 && !slices.ContainsFunc(q.Queries, func(query string) bool { return lists(query, c.name) }) {
			continue
		}
		n.out = wire.AppendMetaContext(n.out, option, 0, c.name)
		if len(n.out) >= listPiece {
			if err := n.flush(); err != nil {
				return false, err
			}
		}
	}
	return false, n.ack(option)
}

// optSetMetaContext replaces the selected contexts, also when it fails.
func (n *negotiation) optSetMetaContext(ctx context.Context, option uint32, data []byte) (bool, error) {
	n.contexts, n.contextsFor = nil, ""
	q, all, ok, err := n.parseMeta(ctx, option, data)
	if !ok {
		return false, err
	}
	var selected []metaContext
	for _, c := range all {
		if slices.Contains(q.Queries, c.name) {
			selected = append(selected, c)
			n.out = wire.AppendMetaContext(n.out, option, c.id, c.name)
		}
	}
	if len(selected) > maxContexts {
		return false, n.fail(option, wire.NBD_REP_ERR_TOO_BIG, fmt.Sprintf("%d contexts: at most %d can be selected", len(selected), maxContexts))
	}
	n.contexts, n.contextsFor = selected, q.Name
	return false, n.ack(option)
}
