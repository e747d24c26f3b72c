package main

import (
	"net"
	"os"
)

// notify tells systemd about the daemon's state, if it asked for that (sd_notify(3)).
func (d *daemon) notify(state string) {
	path := os.Getenv("NOTIFY_SOCKET")
	if path == "" {
		return
	}
	conn, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: path, Net: "unixgram"})
	if err == nil {
		_, err = conn.Write([]byte(state))
		conn.Close()
	}
	if err != nil {
		d.log.Warn("systemd was not notified", "error", err)
	}
}
