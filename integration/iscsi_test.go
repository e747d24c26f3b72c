package integration

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"sheepdog/integration/rig"
)

// skipped are the tests of libiscsi's suite that have nothing to test on a volume, and why.
var skipped = map[string]string{
	"PreventAllow.Simple": "a volume is not removable", "PreventAllow.Eject": "a volume is not removable",
	"PreventAllow.ITNexusLoss": "a volume is not removable", "PreventAllow.Logout": "a volume is not removable",
	"PreventAllow.WarmReset": "a volume is not removable", "PreventAllow.ColdReset": "a volume is not removable",
	"PreventAllow.LUNReset": "a volume is not removable", "PreventAllow.2ITNexuses": "a volume is not removable",
	"NoMedia.NoMediaSBC": "a volume is not removable", "StartStopUnit.Simple": "a volume is not removable",
	"StartStopUnit.PwrCnd": "a volume is not removable", "StartStopUnit.NoLoej": "a volume is not removable",
	"ReadOnly.ReadOnlySBC":   "is run on a snapshot, see below",
	"WriteSame10.ZeroBlocks": "WSNZ: no WRITE SAME to the end, which would have no bound",
	"WriteSame16.ZeroBlocks": "WSNZ: no WRITE SAME to the end, which would have no bound",
	"WriteAtomic16.Simple":   atomicity, "WriteAtomic16.BeyondEol": atomicity, "WriteAtomic16.ZeroBlocks": atomicity,
	"WriteAtomic16.WriteProtect": atomicity, "WriteAtomic16.DpoFua": atomicity, "WriteAtomic16.VPD": atomicity,
	"Sanitize.BlockErase": sanitizing, "Sanitize.BlockEraseReserved": sanitizing, "Sanitize.CryptoErase": sanitizing,
	"Sanitize.CryptoEraseReserved": sanitizing, "Sanitize.ExitFailureMode": sanitizing, "Sanitize.InvalidServiceAction": sanitizing,
	"Sanitize.Overwrite": sanitizing, "Sanitize.OverwriteReserved": sanitizing, "Sanitize.Readonly": sanitizing,
	"Sanitize.Reservations": sanitizing, "Sanitize.Reset": sanitizing,
}

const (
	atomicity  = "only sectors are promised to be old or new after a power cut"
	sanitizing = "a volume cannot promise that nothing is left: snapshots, other copies and logs have it"
)

// wrong are tests of the suite that are themselves wrong, and by what clause.
var wrong = map[string]string{
	// With 8 logical blocks to a physical one it asks for the status at LBA i+1, and wants the first
	// descriptor to begin at LBA i+8. SBC-3 section 5.4 wants the first descriptor to contain the starting LBA.
	// It is right where both are one block: it is run so with blocks of 4096 and of 512 bytes, see below.
	"GetLBAStatus.UnmapSingle": "SBC-3 section 5.4: the first descriptor contains the starting LBA",
}

var (
	suiteLine = regexp.MustCompile(`^Suite: (\S+)`)
	testLine  = regexp.MustCompile(`^\s*Test: (\S+) \.\.\.`)
	failLine  = regexp.MustCompile(`(^|\.\.\.)FAILED\s*$`)
)

// suite runs libiscsi's tests against one or two paths of a volume and returns what came of
// each: passed, skipped or failed.
func suite(t *testing.T, tests string, urls ...string) (results map[string]string, output string) {
	t.Helper()
	r := rig.Run(t, 10*time.Minute, "", "iscsi-test-cu", append([]string{"-V", "--dataloss", "--allow-sanitize", "-t", tests}, urls...)...)
	results = map[string]string{}
	var name, test string
	for line := range strings.Lines(r.Stdout + r.Stderr) {
		line = strings.TrimRight(line, "\n")
		if m := suiteLine.FindStringSubmatch(line); m != nil {
			name = m[1]
		}
		if m := testLine.FindStringSubmatch(line); m != nil {
			test = name + "." + m[1]
			results[test] = "passed"
		}
		switch {
		case test == "":
		case failLine.MatchString(line):
			results[test] = "failed"
		case strings.Contains(line, "[SKIPPED]") && results[test] == "passed":
			results[test] = "skipped"
		}
	}
	if !strings.Contains(r.Stdout, "Tests completed") {
		t.Fatalf("%s did not get to its end: exit status %d\n%s%s", r.Command, r.Code, r.Stdout, r.Stderr)
	}
	return results, r.Stdout
}

// judge holds results against what is expected.
func judge(t *testing.T, results map[string]string, output string, skip, bad map[string]string) {
	t.Helper()
	count := map[string]int{}
	for _, name := range slices.Sorted(maps.Keys(results)) {
		result, want := results[name], "passed"
		switch {
		case skip[name] != "":
			want = "skipped"
			t.Logf("%s is skipped: %s", name, skip[name])
		case bad[name] != "":
			want = "failed"
			t.Logf("%s is wrong: %s", name, bad[name])
		}
		count[result]++
		if result != want {
			t.Errorf("%s: %s, want %s", name, result, want)
		}
	}
	if t.Failed() {
		t.Log(output)
	}
	t.Logf("%d passed, %d skipped, %d failed", count["passed"], count["skipped"], count["failed"])
}

// libiscsi's own suite.
func TestISCSISuite(t *testing.T) {
	besideOthers(t)
	rig.Need(t, "iscsi-test-cu")
	s := rig.Start(t, rig.Options{})
	s.Dog("vdi", "create", "vm1", "256M")
	s.Dog("vdi", "create", "vm2", "64M")
	s.Dog("vdi", "snapshot", "vm2", "-s", "ro")
	results, output := suite(t, "ALL", s.ISCSI("vm1"), s.ISCSI("vm1"))
	if len(results) < 230 {
		t.Errorf("only %d tests were run", len(results))
	}
	judge(t, results, output, skipped, wrong)
	results, output = suite(t, "ALL.ReadOnly", s.ISCSI("vm2.ro"))
	judge(t, results, output, nil, nil)
}

// The same where a logical block is as long as a physical one.
func TestISCSISuite4K(t *testing.T) {
	besideOthers(t)
	rig.Need(t, "iscsi-test-cu")
	s := rig.Start(t, rig.Options{Config: "iscsi:\n  block_size: 4096\n"})
	s.Dog("vdi", "create", "vm1", "512M")
	for _, name := range []string{"GetLBAStatus", "Read*", "Unmap", "WriteSame16", "CompareAndWrite"} {
		results, output := suite(t, "ALL."+name, s.ISCSI("vm1"))
		skip := map[string]string{"WriteSame16.ZeroBlocks": skipped["WriteSame16.ZeroBlocks"], "ReadOnly.ReadOnlySBC": "is run on a snapshot"}
		for k := range results {
			// Tests of parts of a physical block have nothing to test here.
			if strings.HasSuffix(k, "Unaligned") || strings.HasSuffix(k, "InvalidDataOutSize") {
				skip[k] = "a physical block has one logical block only"
			}
		}
		judge(t, results, output, skip, map[string]string{
			"WriteSame16.Unmap": "SBC-3 section 6.5.3: it writes 256 MiB with one command, beyond MAXIMUM TRANSFER LENGTH",
		})
	}
}

// The same where initiators are told that a physical block is as short as a logical one.
func TestISCSISuite512n(t *testing.T) {
	rig.Need(t, "iscsi-test-cu")
	s := rig.Start(t, rig.Options{Config: "iscsi:\n  physical_block_size: 512\n"})
	s.Dog("vdi", "create", "vm1", "64M")
	results, output := suite(t, "ALL.GetLBAStatus", s.ISCSI("vm1"))
	judge(t, results, output, nil, nil)
	results, output = suite(t, "ALL.Unmap", s.ISCSI("vm1"))
	judge(t, results, output, nil, nil)
}

// The clients that people use.
func TestISCSIClients(t *testing.T) {
	besideOthers(t)
	rig.Need(t, "iscsi-ls", "iscsi-inq", "qemu-img", "qemu-io")
	s := rig.Start(t, rig.Options{})
	s.Dog("vdi", "create", "vm1", "64M")
	url := s.ISCSI("vm1")
	portal := strings.SplitAfter(url, "/")
	rig.Contains(t, rig.OK(t, "iscsi-ls", "-s", strings.Join(portal[:3], "")), "Target:"+rig.IQN+":vm1", "DIRECT_ACCESS")
	rig.Contains(t, rig.OK(t, "iscsi-inq", url), "SHEEPDOG", "SPC-4", "SBC-3", "iSCSI")

	image := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(image, rig.Random(5, 20<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(image, 64<<20); err != nil {
		t.Fatal(err)
	}
	rig.Contains(t, rig.OK(t, "qemu-img", "info", url), "virtual size: 64 MiB")
	rig.OK(t, "qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", image, url)
	rig.Contains(t, rig.OK(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", image, url), "identical")
	rig.Contains(t, rig.OK(t, "qemu-img", "map", "--output=json", "-f", "raw", url), `"start": 0, "length": 20971520`, `"data": false`)
	s.Dog("vdi", "snapshot", "vm1", "-s", "then")
	rig.OK(t, "qemu-io", "-f", "raw", "-t", "none", "-c", "write -f -P 7 0 1M", "-c", "write -z 1M 1M", "-c", "discard 2M 1M", "-c", "flush",
		"-c", "read -P 7 0 1M", "-c", "read -P 0 1M 2M", url)
	rig.Contains(t, rig.OK(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", image, s.ISCSI("vm1.then")), "identical")
	rig.OK(t, "qemu-img", "bench", "-f", "raw", "-t", "none", "-c", "2000", "-d", "32", "-s", "4k", url)
	rig.OK(t, "qemu-img", "bench", "-f", "raw", "-t", "none", "-w", "-c", "500", "-d", "32", "-s", "4k", "--pattern=7", url)
	// QEMU and libiscsi send a non-immediate NOP-Out every 5 s.
	pause := "sleep 7000"
	if soaking() {
		pause = "sleep 70000"
	}
	rig.OK(t, "qemu-io", "-f", "raw", "-c", "read -P 7 0 4k", "-c", pause, "-c", "read -P 7 0 4k", url)
	rig.Contains(t, s.Dog("session", "list"), "")
	// NBD sees what iSCSI wrote.
	rig.OK(t, "qemu-io", "-f", "raw", "-r", "-c", "read -P 7 0 1M", s.URI("vm1"))
}

// CHAP one way and both, by the clients that know it.
func TestISCSIChap(t *testing.T) {
	rig.Need(t, "iscsi-ls", "qemu-img")
	dir := t.TempDir()
	file := func(name, secret string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(secret+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	s := rig.Start(t, rig.Options{Config: fmt.Sprintf("iscsi:\n  chap: {user: joe, secret_file: %s, mutual_user: target, mutual_secret_file: %s}\n",
		file("a", "correct-horse-battery"), file("b", "staple-staple-staple"))})
	s.Dog("vdi", "create", "vm1", "8M")
	url := s.ISCSI("vm1")
	with := func(who string) string { return strings.Replace(url, "iscsi://", "iscsi://"+who+"@", 1) }
	rig.OK(t, "iscsi-inq", with("joe%correct-horse-battery"))
	rig.OK(t, "iscsi-inq", with("joe%correct-horse-battery")+"?target_user=target&target_password=staple-staple-staple&header_digest=crc32c")
	rig.Fails(t, "iscsi-inq", with("joe%wrong-horse-battery"))
	rig.Fails(t, "iscsi-inq", url)
	secret := file("c", "correct-horse-battery")
	os.WriteFile(secret, []byte("correct-horse-battery"), 0o600)
	rig.Contains(t, rig.OK(t, "qemu-img", "info", "--object", "secret,id=s,file="+secret, "--image-opts",
		fmt.Sprintf("driver=iscsi,transport=tcp,portal=%s:%d,target=%s:vm1,lun=0,user=joe,password-secret=s", s.Host(), s.ISCSIPort, rig.IQN)), "virtual size: 8 MiB")
	if strings.Contains(s.Log(), "correct-horse") || strings.Contains(s.Log(), "staple-staple") {
		t.Error("a secret is in the log")
	}
}
