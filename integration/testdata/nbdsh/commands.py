# Each command with each of its flags, whole and odd offsets, down to single bytes.
h.connect_uri(uri)
assert h.get_size() == 64 << 20
assert h.get_structured_replies_negotiated()
assert h.get_block_size(nbd.SIZE_MINIMUM) == 1
assert h.get_block_size(nbd.SIZE_PREFERRED) == 4096
assert h.get_block_size(nbd.SIZE_MAXIMUM) >= 32 << 20
assert not h.is_read_only()
h.zero(64 << 20, 0)

h.pwrite(b"a" * 4096, 0)
h.pwrite(b"b" * 4096, 4096, nbd.CMD_FLAG_FUA)
h.pwrite(b"c", 4095)
h.pwrite(b"d" * 3, 8190, nbd.CMD_FLAG_FUA)
assert h.pread(8192 + 2, 0) == b"a" * 4095 + b"c" + b"b" * 4094 + b"ddd" + b"\0"

h.zero(4096, 0)
assert h.pread(4096, 0) == b"\0" * 4096
h.pwrite(b"e" * 65536, 65536)
h.zero(65536, 65536, nbd.CMD_FLAG_NO_HOLE)
assert h.pread(65536, 65536) == b"\0" * 65536
h.pwrite(b"e" * 65536, 65536)
h.zero(65536, 65536, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA)
h.pwrite(b"e" * 65536, 65536)
h.zero(65536, 65536, nbd.CMD_FLAG_FUA)
assert h.pread(65536, 65536) == b"\0" * 65536
h.pwrite(b"e" * 65536, 65536)
h.trim(65536, 65536)
assert h.pread(65536, 65536) == b"\0" * 65536
h.pwrite(b"e" * 65536, 65536)
h.trim(65536, 65536, nbd.CMD_FLAG_FUA)
h.zero(1, 4097)
h.zero(4096 * 3 + 5, 4098)

h.cache(1 << 20, 0)
h.flush()

# A request over the borders of several objects (4 MiB each).
big = bytes(range(256)) * (10 << 12)
h.pwrite(big, (4 << 20) - 12345)
assert h.pread(len(big), (4 << 20) - 12345) == big
h.trim(6 << 20, (4 << 20) - 12345)
assert h.pread(6 << 20, (4 << 20) - 12345) == bytes(6 << 20)

# The last byte.
h.pwrite(b"z", (64 << 20) - 1)
assert h.pread(1, (64 << 20) - 1) == b"z"
h.trim(1, (64 << 20) - 1)

# All of the volume in one zeroing.
h.zero(64 << 20, 0, nbd.CMD_FLAG_FAST_ZERO)
assert h.pread(1 << 20, 4 << 20) == bytes(1 << 20)
h.shutdown()
