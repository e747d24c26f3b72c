# A snapshot is a read-only export: every change is refused with EPERM, reads go on.
import errno
h.set_strict_mode(0)
h.connect_uri(ro)
assert h.is_read_only()
for f, args in ((h.pwrite, (b"x", 0)), (h.trim, (4096, 0)), (h.zero, (4096, 0)), (h.pwrite, (b"x" * 100000, 5, nbd.CMD_FLAG_FUA))):
    try:
        f(*args)
    except nbd.Error as e:
        assert e.errnum == errno.EPERM, e
    else:
        raise AssertionError("%s was not refused" % f.__name__)
assert h.pread(4096, 0) == bytes(4096)
h.flush()
h.shutdown()
