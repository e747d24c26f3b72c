# Structured replies: chunks in any order, holes as holes, DF in one piece, block status.
h.add_meta_context("base:allocation")
h.add_meta_context("qemu:dirty-bitmap:nosuch")
h.connect_uri(uri)
assert h.can_meta_context("base:allocation")
assert not h.can_meta_context("qemu:dirty-bitmap:nosuch")
h.zero(64 << 20, 0)
h.pwrite(b"1" * 8192, 4096)
h.pwrite(b"2" * 4096, 16 << 20)

seen = []
def chunk(buf, offset, status, err):
    seen.append((offset, len(buf), status))
buf = h.pread_structured(1 << 20, 0, chunk)
assert buf == b"\0" * 4096 + b"1" * 8192 + b"\0" * ((1 << 20) - 12288)
assert sum(n for _, n, _ in seen) == 1 << 20, seen
seen = []
h.pread_structured(1 << 20, 0, chunk, nbd.CMD_FLAG_DF)
assert len(seen) == 1, seen

extents = []
def status(context, offset, entries, err):
    assert context == "base:allocation"
    extents.append((offset, list(entries)))
h.block_status(64 << 20, 0, status)
flat, off = [], 0
for length, kind in zip(extents[0][1][0::2], extents[0][1][1::2]):
    if flat and flat[-1][2] == kind: flat[-1][1] += length
    else: flat.append([off, length, kind])
    off += length
assert flat[0] == [0, 4096, nbd.STATE_HOLE | nbd.STATE_ZERO], flat
assert flat[1] == [4096, 8192, 0], flat
assert [16 << 20, 4096, 0] in flat, flat
extents = []
h.block_status((64 << 20) - 4096, 4096, status, nbd.CMD_FLAG_REQ_ONE)
assert extents[0][1] == [8192, 0], extents
h.shutdown()
