package integration

import (
	"os"
	"testing"

	"sheepdog/integration/rig"
)

// besideOthers lets a test run at the same time as others that call it, after all those that do not. It is for
// tests that wait most of their time and whose limits are such that only what never ends exceeds
// them. Each has daemons, addresses and directories of its own. In make soak, which
// measures, every test is alone.
func besideOthers(t *testing.T) {
	t.Helper()
	if !soaking() {
		t.Parallel()
	}
}

func TestMain(m *testing.M) {
	if code, ran := rig.OwnMounts(); ran {
		os.Exit(code)
	}
	code := m.Run()
	rig.RemoveBuilt()
	os.Exit(code)
}
