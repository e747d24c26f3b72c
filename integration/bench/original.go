package main

// What others did at the same work, on a machine of the same kind (2 shared cores, loopback, Debian 12, November 2026); 0:
// not measured. Absolute figures of such machines move by a factor of several from run to run: the ratios say in
// which class a figure is, not more.
//
//	original  sheepdog 1.0.1 (C, -O2), local cluster driver, 3 nodes, 3 copies, through QEMU 5.2's own driver with
//	          qemu-img bench and cache=none, so that every write is durable when it is answered
//	vitastor  Vitastor 3.0.8, 3 OSDs, 3 copies, fio through its own client library, writes not durable before a flush;
//	          for durable writes, with an fsync after every 1 or 32 of them
//	disk      a raw file there, each write through to the disk: what the figures before can be held against
type elsewhere struct{ original, vitastor, disk float64 }

// clusterCase is work on the cluster, with what others made of it.
type clusterCase struct {
	workload
	elsewhere
	goal float64 // times the original's figure
}

var clusterCases = []clusterCase{
	{workload{name: "4k-randread-qd1", unit: "IOPS", run: fio("randread", "4k", 1)}, elsewhere{5500, 7700, 0}, 0},
	{workload{name: "4k-randread-qd32", unit: "IOPS", run: fio("randread", "4k", 32)}, elsewhere{17600, 55000, 0}, 2},
	{workload{name: "4k-randwrite-qd1", unit: "IOPS", run: fio("randwrite", "4k", 1)}, elsewhere{1100, 3600, 6300}, 0},
	{workload{name: "4k-randwrite-qd32", unit: "IOPS", run: fio("randwrite", "4k", 32)}, elsewhere{2200, 16900, 26000}, 5},
	{workload{name: "4k-randwrite-fua-qd1", unit: "IOPS", run: fua(1)}, elsewhere{1100, 1700, 6300}, 0},
	{workload{name: "4k-randwrite-fua-qd32", unit: "IOPS", run: fua(32)}, elsewhere{2200, 15400, 26000}, 5},
	{workload{name: "64k-read-qd1", unit: "MB/s", run: fio("read", "64k", 1)}, elsewhere{269, 0, 0}, 0},
	{workload{name: "64k-read-qd32", unit: "MB/s", run: fio("read", "64k", 32)}, elsewhere{479, 0, 0}, 0},
	{workload{name: "64k-write-qd1", unit: "MB/s", run: fio("write", "64k", 1)}, elsewhere{71, 0, 303}, 3},
	{workload{name: "64k-write-qd32", unit: "MB/s", run: fio("write", "64k", 32)}, elsewhere{85, 0, 958}, 3},
	{workload{name: "1m-read-qd1", unit: "MB/s", run: fio("read", "1m", 1)}, elsewhere{852, 0, 0}, 0},
	{workload{name: "1m-read-qd32", unit: "MB/s", run: fio("read", "1m", 32)}, elsewhere{1106, 0, 0}, 0},
	{workload{name: "1m-write-qd1", unit: "MB/s", run: fio("write", "1m", 1)}, elsewhere{194, 0, 1465}, 3},
	{workload{name: "1m-write-qd32", unit: "MB/s", run: fio("write", "1m", 32)}, elsewhere{255, 0, 1991}, 3},
	{workload{name: "1m-read-qd4", unit: "MB/s", run: fio("read", "1m", 4)}, elsewhere{0, 1063, 0}, 0},
	{workload{name: "1m-write-qd4", unit: "MB/s", run: fio("write", "1m", 4)}, elsewhere{0, 415, 0}, 0},
}

// Of recovery: the original rebuilt 1.4 GiB of two copies at 290 to 420 MiB/s after the loss of one of three nodes; a client
// that wrote 4 KiB at depth 1 fell from 1700 to 27 to 65 IOPS meanwhile, with a p99 of 90 ms.
const (
	originalRecovery = 370   // MB/s, the middle
	originalShare    = 0.027 // of the client's IOPS, the middle
	originalP99      = 90    // ms
	goalRecovery     = 300   // MB/s, idle
	goalShare        = 0.5
)
