package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"strconv"

	"github.com/spf13/cobra"

	"sheepdog/frontends/admin/api"
)

// argument returns an optional argument.
func argument(args []string, i int) string {
	if i < len(args) {
		return args[i]
	}
	return ""
}

// byteRange reads the arguments [OFF [LEN]]; length -1: to the end.
func byteRange(args []string) (off, length int64, err error) {
	length = -1
	if len(args) > 0 {
		if off, err = parseSize(args[0]); err != nil {
			return 0, 0, err
		}
	}
	if len(args) > 1 {
		length, err = parseSize(args[1])
	}
	return off, length, err
}

func (a *app) vdiRead() *cobra.Command {
	var snapshot string
	var c *cobra.Command
	c = a.onVDI("read NAME [OFF [LEN]]", "Write content of a volume to the standard output", "OFF and LEN are sizes; without them, all of it.",
		between(1, 3), func(args []string) error {
			if err := emptySnapshot(c, snapshot); err != nil {
				return err
			}
			off, length, err := byteRange(args[1:])
			if err != nil {
				return err
			}
			r, err := a.api.Read(a.ctx, args[0], snapshot, off, length)
			if err != nil {
				return err
			}
			defer r.Close()
			return a.copyOut(a.out, r, "standard output")
		})
	a.snapshotFlag(c, &snapshot, "`TAG` or number of a snapshot")
	return c
}

// copyOut copies what the sheep sends; errors of the target name it.
func (a *app) copyOut(w io.Writer, r io.Reader, name string) error {
	out := &namedWriter{w, name}
	b := bufio.NewWriterSize(out, pieceBytes)
	if _, err := io.Copy(b, r); err != nil {
		return err
	}
	return b.Flush()
}

type namedWriter struct {
	w    io.Writer
	name string
}

// Write implements io.Writer.
func (n *namedWriter) Write(p []byte) (int, error) {
	k, err := n.w.Write(p)
	if err != nil {
		err = fmt.Errorf("write %s: %w", n.name, err)
	}
	return k, err
}

var writtenGrid = grid[api.Written]{
	{raw: "bytes", value: func(w api.Written) any { return w.Bytes }},
	{raw: "zeros", value: func(w api.Written) any { return w.Zeros }},
}

func (a *app) vdiWrite() *cobra.Command {
	return a.onVDI("write NAME [OFF [LEN]]", "Write the standard input into a VDI", "OFF and LEN are sizes; without LEN, to the end of the\ninput. When it returns, the content is durable.\n\n"+writtenGrid.rawHelp(),
		between(1, 3), func(args []string) error {
			off, length, err := byteRange(args[1:])
			if err != nil {
				return err
			}
			var in io.Reader = a.in
			if length >= 0 {
				in = &exactReader{r: a.in, left: length, want: length}
			}
			if length == 0 {
				return usagef("there is nothing to write: LEN is 0")
			}
			w, err := a.api.Write(a.ctx, args[0], off, in, length)
			if err != nil {
				return err
			}
			return done(a, writtenGrid, w, "%d bytes are written to %s", w.Bytes, args[0])
		})
}

// exactReader fails if there is less than wanted.
type exactReader struct {
	r          io.Reader
	left, want int64
}

// Read implements io.Reader.
func (e *exactReader) Read(p []byte) (int, error) {
	if e.left == 0 {
		return 0, io.EOF
	}
	n, err := e.r.Read(p[:min(int64(len(p)), e.left)])
	e.left -= int64(n)
	if err == io.EOF && e.left > 0 {
		err = hint("what came before may be written", "the standard input ended after %d of %d bytes", e.want-e.left, e.want)
	}
	if err == io.EOF {
		err = nil // the end is where it should be
	}
	return n, err
}

func (a *app) vdiImport() *cobra.Command {
	var o api.ImportOptions
	var overwrite bool
	var object objectSize
	c := a.onVDI("import NAME [FILE]", "Make a VDI of a raw image", `FILE is a raw image or a block device; without it, or with -,
the standard input is read. Holes and zeros take no space. Images in other formats:
qemu-img convert -n -O raw IMAGE nbd://HOST/NAME. If an import fails, the VDI that it
made is deleted again.

`+writtenGrid.rawHelp(), between(1, 2), func(args []string) (err error) {
		if o.ObjectSize, err = object.bytes(); err != nil {
			return err
		}
		if overwrite && (o.ObjectSize != 0 || o.Copies != 0) {
			return usagef("an existing VDI has its size of objects and its copies already")
		}
		o.Create = !overwrite
		return a.importInto(args[0], argument(args, 1), o)
	})
	c.Flags().BoolVar(&overwrite, "overwrite", false, "write into an existing VDI; what is beyond the image stays")
	c.Flags().IntVarP(&o.Copies, "copies", "c", 0, "`N`umber of copies (default: the cluster's)")
	object.flags(c)
	return c
}

func (a *app) importInto(name, file string, o api.ImportOptions) error {
	src, err := a.openSource(file)
	if err != nil {
		return err
	}
	defer src.close()
	p := a.progress("import "+name, src.size, true)
	r, w := io.Pipe()
	go func() {
		buffered := bufio.NewWriterSize(w, pieceBytes+holeBytes)
		err := src.send(buffered, p)
		if err == nil {
			err = buffered.Flush()
		}
		w.CloseWithError(err) // nil is the end
	}()
	written, err := a.api.Import(a.ctx, name, o, r)
	r.CloseWithError(errStopped) // the sender ends
	p.end()
	if err != nil {
		return importError(name, o, err)
	}
	return done(a, writtenGrid, written, "%s is imported: %s with %s of content", name, human(written.VDI.Size), human(written.Bytes))
}

// errStopped is what the sender of an import meets when the sheep wants no more.
var errStopped = errors.New("the import has ended")

// importError adds what only this program knows to say.
func importError(name string, o api.ImportOptions, err error) error {
	switch kind := api.KindOf(err); {
	case kind == api.KindExists:
		return hint(`give another name, or write into it with --overwrite`, "%w", err)
	case kind == api.KindBroken && o.Create:
		return hint(fmt.Sprintf(`if %s is there when the sheep is back, it is incomplete: "dog vdi delete %s", and try again`, name, name), "%w", err)
	}
	return err
}

func (a *app) vdiExport() *cobra.Command {
	var snapshot string
	var force bool
	var c *cobra.Command
	c = a.onVDI("export NAME FILE", "Write a volume to a raw image", `FILE becomes sparse where the volume has holes or zeros; - is
the standard output. What is written to the volume meanwhile may be in it or not: take a
snapshot and export that for one moment's content.`,
		exactly(2), func(args []string) error {
			if err := emptySnapshot(c, snapshot); err != nil {
				return err
			}
			return a.exportTo(args[0], snapshot, args[1], force)
		})
	a.snapshotFlag(c, &snapshot, "`TAG` or number of a snapshot")
	c.Flags().BoolVarP(&force, "force", "f", false, "replace an existing file")
	return c
}

func (a *app) exportTo(name, snapshot, file string, force bool) error {
	t, err := a.openTarget(file, force)
	if err != nil {
		return err
	}
	defer t.discard()
	body, err := a.api.Export(a.ctx, name, snapshot)
	if err != nil {
		return err
	}
	defer body.Close()
	in, err := api.NewExtentReader(body)
	if err != nil {
		return streamError(a.api.Address(), err)
	}
	p := a.progress("export "+name, in.Size(), true)
	defer p.end()
	if err := receive(in, t, p); err != nil {
		return streamError(a.api.Address(), err)
	}
	if err := t.commit(in.Size()); err != nil {
		return err
	}
	if t.file == nil {
		return nil // its content is all that the standard output has
	}
	return a.say("%s is exported to %s: %s", name, file, human(in.Size()))
}

// receive writes a stream of extents to a target.
func receive(in *api.ExtentReader, t *target, p *progress) error {
	buf := make([]byte, pieceBytes)
	for {
		x, err := in.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		if x.Zero {
			err = t.Zero(x.Off, x.Len)
		} else {
			err = receiveData(in, t, x, buf)
		}
		if err != nil {
			return err
		}
		p.set(x.Off + x.Len)
	}
}

func receiveData(in *api.ExtentReader, t *target, x api.Extent, buf []byte) error {
	for x.Len > 0 {
		p := buf[:min(int64(len(buf)), x.Len)]
		if _, err := io.ReadFull(in, p); err != nil {
			return err
		}
		if err := t.Data(x.Off, p); err != nil {
			return err
		}
		x.Off, x.Len = x.Off+int64(len(p)), x.Len-int64(len(p))
	}
	return nil
}

// streamError says of a stream that was cut off whose fault that is.
func streamError(address string, err error) error {
	if errors.Is(err, api.ErrStream) {
		return &api.Error{Kind: api.KindBroken, Message: fmt.Sprintf("the answer of the sheep at %s is not whole: %v", address, err), Hint: "see whether it is still running, and try again"}
	}
	return err
}

func (a *app) vdiBackup() *cobra.Command {
	var snapshot, from string
	var force bool
	c := a.onVDI("backup NAME FILE", "Write a backup of a snapshot", `FILE is not an image: "vdi restore" makes a VDI of it. With
--from only what differs from that snapshot is in it; restore that one first. Without
FILE, or with -, it goes to the standard output.`,
		between(1, 2), func(args []string) error {
			if snapshot == "" {
				return usagef("say which snapshot to back up, with -s TAG")
			}
			return a.backupTo(args[0], snapshot, from, argument(args, 1), force)
		})
	c.Use = "backup NAME [FILE]"
	a.snapshotFlag(c, &snapshot, "`TAG` or number of the snapshot")
	c.Flags().StringVarP(&from, "from", "F", "", "`TAG` or number of the snapshot that the backup is the difference to")
	c.RegisterFlagCompletionFunc("from", a.snapshotNames)
	c.Flags().BoolVarP(&force, "force", "f", false, "replace an existing file")
	return c
}

func (a *app) backupTo(name, snapshot, from, file string, force bool) error {
	if file == "" {
		file = "-"
	}
	t, err := a.openTarget(file, force)
	if err != nil {
		return err
	}
	defer t.discard()
	body, err := a.api.Backup(a.ctx, name, snapshot, from)
	if err != nil {
		return err
	}
	defer body.Close()
	p := a.progress("backup "+name, -1, true)
	defer p.end()
	if err := a.copyOut(t.w, p.counted(body), t.name); err != nil {
		return err
	}
	if err := t.commit(-1); err != nil {
		return err
	}
	if t.file == nil {
		return nil
	}
	return a.say("snapshot %s of %s is backed up to %s", snapshot, name, file)
}

func (a *app) vdiRestore() *cobra.Command {
	return a.onVDI("restore NAME [FILE]", "Restore a backup", `A full backup makes the VDI; an incremental one needs it to have the snapshot
that the backup is based on, and to be unchanged since. The snapshot that was backed up
is there afterwards. If it fails, all is as before. Without FILE, or with -, the standard
input is read.

`+vdiGrid.rawHelp(), between(1, 2), func(args []string) error {
		src, err := a.openSource(argument(args, 1))
		if err != nil {
			return err
		}
		defer src.close()
		p := a.progress("restore "+args[0], src.size, true)
		v, err := a.api.Restore(a.ctx, args[0], p.counted(src.r))
		p.end()
		if err != nil {
			return err
		}
		return done(a, vdiGrid, v, "%s is restored: snapshot %s, %s", args[0], snapshotName(v), human(v.Size))
	})
}

var extentGrid = grid[api.Extent]{
	{head: "Offset", right: true, cell: func(x api.Extent) string { return strconv.FormatInt(x.Off, 10) }, raw: "offset", value: func(x api.Extent) any { return x.Off }},
	{head: "Length", right: true, cell: func(x api.Extent) string { return strconv.FormatInt(x.Len, 10) }, raw: "length", value: func(x api.Extent) any { return x.Len }},
	{head: "Is now", cell: extentState, raw: "state", value: func(x api.Extent) any { return extentState(x) }},
}

func extentState(x api.Extent) string {
	if x.Zero {
		return "zero"
	}
	return "data"
}

func (a *app) vdiDiff() *cobra.Command {
	var snapshots []string
	c := a.onVDI("diff NAME", "Show where a volume differs from a snapshot", `With one -s, what changed since that snapshot; with two, what
changed from the first to the second. In bytes, at a grain of 4096. No content is read.

`+extentGrid.rawHelp(), exactly(1), func(args []string) error {
		to := ""
		switch len(snapshots) {
		case 1:
		case 2:
			to = snapshots[1]
		default:
			return usagef("say what to compare: -s TAG once or twice")
		}
		if snapshots[0] == "" || len(snapshots) == 2 && to == "" {
			return usagef("-s has no tag")
		}
		s := newStream(a, extentGrid)
		return s.end(a.api.Diff(a.ctx, args[0], snapshots[0], to, s.add))
	})
	c.Flags().StringArrayVarP(&snapshots, "snapshot", "s", nil, "`TAG` or number of a snapshot")
	c.RegisterFlagCompletionFunc("snapshot", a.snapshotNames)
	return c
}
