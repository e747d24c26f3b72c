# What the server must refuse, with the right error, and go on.
import errno
h.set_strict_mode(0)
h.connect_uri(uri)

def refused(want, f, *args):
    try:
        f(*args)
    except nbd.Error as e:
        assert e.errnum in want, "%s: %s" % (f.__name__, e)
        return
    raise AssertionError("%s%s was not refused" % (f.__name__, args[1:]))

end = 64 << 20
refused([errno.EINVAL], h.pread, 1, end)
refused([errno.EINVAL], h.pread, 2, end - 1)
refused([errno.EINVAL], h.pread, 4096, (1 << 63) - 4096)
refused([errno.ENOSPC, errno.EINVAL], h.pwrite, b"x" * 2, end - 1)
refused([errno.ENOSPC, errno.EINVAL], h.pwrite, b"x" * 4096, end)
refused([errno.EINVAL, errno.ENOSPC], h.zero, 2, end - 1)
refused([errno.EINVAL, errno.ENOSPC], h.trim, 2, end - 1)
refused([errno.EINVAL], h.cache, 2, end - 1)
refused([errno.EINVAL], h.pread, 4096, 0, 1 << 9)          # a flag that nobody knows
refused([errno.EINVAL], h.pwrite, b"x", 0, nbd.CMD_FLAG_DF)  # a flag of another command
refused([errno.EINVAL], h.trim, 4096, 0, nbd.CMD_FLAG_NO_HOLE)
refused([errno.EINVAL], h.block_status, 4096, 0, lambda *a: 0)  # no context negotiated
h.pwrite(b"still here", 0)
assert h.pread(10, 0) == b"still here"
h.shutdown()
