package object

// CopyRequest asks for Dst to be made from the whole content of Src where the data
// is. An existing Dst is left as it is. A missing Src fails with ErrNotFound. The
// copy is durable with the next OpSync after it completed.
type CopyRequest struct {
	Dst, Src             ID
	DstPolicy, SrcPolicy PolicyID
	SizeShift            uint8
	Volume               VID // fences Dst, see Request
	Generation           uint64
}

// DeleteRequest asks for an object to be removed. A missing one is no error. The removal
// is durable with the next OpSync after it completed.
type DeleteRequest struct {
	Policy     PolicyID
	ID         ID
	Volume     VID // fences the removal, see Request
	Generation uint64
}
