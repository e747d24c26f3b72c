package integration

import (
	"os"
	"testing"

	"sheepdog/integration/rig"
)

func TestMain(m *testing.M) {
	if code, ran := rig.OwnMounts(); ran {
		os.Exit(code)
	}
	code := m.Run()
	rig.RemoveBuilt()
	os.Exit(code)
}
