package integration

import (
	"os"
	"testing"

	"sheepdog/integration/rig"
)

func TestMain(m *testing.M) {
	code := m.Run()
	rig.RemoveBuilt()
	os.Exit(code)
}
