package integration

import (
	"path/filepath"
	"testing"

	"sheepdog/integration/rig"
)

// TLS with a client certificate: who has one gets in, who has none or speaks plain does not.
func TestTLS(t *testing.T) {
	rig.Need(t, "nbdinfo", "qemu-img", "nbdcopy")
	address := rig.FreeAddress(t)
	certs := rig.Certificates(t, address)
	strange := rig.Certificates(t, address) // made by another CA
	s := rig.Start(t, rig.Options{Address: address, NBD: "  tls:\n" +
		"    cert: " + filepath.Join(certs, "server-cert.pem") + "\n" +
		"    key: " + filepath.Join(certs, "server-key.pem") + "\n" +
		"    client_ca: " + filepath.Join(certs, "ca-cert.pem") + "\n"})
	s.Dog("vdi", "create", "vm1", "64M")

	tls := "nbds://" + s.NBD() + "/vm1?tls-certificates="
	rig.Contains(t, rig.OK(t, "nbdinfo", tls+certs), "with TLS")
	image, back := rig.File(t, "image", rig.Random(3, 16<<20)), filepath.Join(t.TempDir(), "back")
	s.Dog("vdi", "create", "vm2", "16M")
	rig.OK(t, "nbdcopy", image, "nbds://"+s.NBD()+"/vm2?tls-certificates="+certs)
	rig.OK(t, "nbdcopy", "nbds://"+s.NBD()+"/vm2?tls-certificates="+certs, back)
	same(t, image, back)
	rig.Contains(t, rig.OK(t, "qemu-img", "info", "--object", "tls-creds-x509,id=t,endpoint=client,dir="+certs,
		"--image-opts", "driver=nbd,host="+address+",port="+port(s)+",export=vm1,tls-creds=t"), "64 MiB")

	rig.Fails(t, "nbdinfo", s.URI("vm1"))
	rig.Fails(t, "nbdinfo", tls+strange)
	rig.OK(t, "nbdinfo", tls+certs)
	noPanic(t, s)
}

// Who is not on the list of allowed addresses is turned away before anything is said.
func TestAllowList(t *testing.T) {
	rig.Need(t, "nbdinfo")
	s := rig.Start(t, rig.Options{NBD: "  allow: [\"127.0.0.9/32\"]\n"})
	s.Dog("vdi", "create", "vm1", "64M")
	rig.Fails(t, "nbdinfo", s.URI("vm1"))
	rig.OK(t, "nbdinfo", "nbd+unix:///vm1?socket="+s.Unix) // the socket has its file's permissions instead
}
