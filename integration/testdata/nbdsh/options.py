# The handshake: LIST, INFO of one export then GO of another, meta contexts listed, ABORT, plain replies.
names = {}
h.set_opt_mode(True)
h.connect_uri(server)
h.opt_list(lambda name, text: names.__setitem__(name, text))
assert {"vm1", "vm2", "vm2@t"} <= set(names), names
h.set_export_name("vm2@t")
h.opt_info()
assert h.is_read_only()
h.set_export_name("nosuch")
try:
    h.opt_info()
    raise AssertionError("INFO of an unknown export was answered")
except nbd.Error:
    pass
h.set_export_name("vm2")
h.add_meta_context("base:")
contexts = []
h.opt_list_meta_context(lambda name: contexts.append(name))
assert "base:allocation" in contexts, contexts
h.clear_meta_contexts()
h.add_meta_context("qemu:dirty-bitmap:t")
h.opt_go()
assert h.can_meta_context("qemu:dirty-bitmap:t")
assert not h.is_read_only()
h.shutdown()

a = nbd.NBD()
a.set_opt_mode(True)
a.connect_uri(server)
a.opt_abort()

p = nbd.NBD()
p.set_request_structured_replies(False)
p.connect_uri(uri)
assert not p.get_structured_replies_negotiated()
p.pwrite(b"plain" * 1000, 123)
assert p.pread(5000, 123) == b"plain" * 1000
p.shutdown()

# The oldest way in: NBD_OPT_EXPORT_NAME (no fixed newstyle asked for).
o = nbd.NBD()
o.set_handshake_flags(0)
o.connect_uri(uri)
assert o.get_protocol() == "newstyle", o.get_protocol()
assert o.get_size() == 64 << 20
assert o.pread(5000, 123) == b"plain" * 1000
o.shutdown()
