package hypervisor_test

import "encoding/binary"

// The boot sector's guest writes to every page from dirtyFrom to dirtyTo, 18
// times a second, and sleeps in between. That is far more than a migration
// limited to 1 MiB/s can send, and little enough work for it to converge at once
// without the limit.
const (
	dirtyFrom = 1 << 20
	dirtyTo   = 17 << 20
)

// bootSector is a disk image of one sector with that program. It runs in real
// mode, where the BIOS's timer interrupt ends each HLT, with the data segment's
// limit raised to 4 GiB ("unreal mode") so that it can reach the memory.
func bootSector() []byte {
	var code []byte
	add := func(b ...byte) { code = append(code, b...) }
	add32 := func(v uint32) { code = binary.LittleEndian.AppendUint32(code, v) }

	add(0xFA)             //	cli
	add(0x31, 0xC0)       //	xor ax, ax
	add(0x8E, 0xD8)       //	mov ds, ax
	add(0x8E, 0xD0)       //	mov ss, ax
	add(0xBC, 0x00, 0x70) //	mov sp, 0x7000
	add(0xE4, 0x92)       //	in al, 0x92
	add(0x0C, 0x02)       //	or al, 2		A20 on
	add(0xE6, 0x92)       //	out 0x92, al
	again := len(code)
	add(0xFA)                         // again:	cli
	add(0x0F, 0x01, 0x16, 0xE0, 0x7D) //	lgdt [0x7DE0]
	add(0x0F, 0x20, 0xC0)             //	mov eax, cr0
	add(0x0C, 0x01)                   //	or al, 1
	add(0x0F, 0x22, 0xC0)             //	mov cr0, eax		protected mode
	add(0xBB, 0x08, 0x00)             //	mov bx, 8
	add(0x8E, 0xDB)                   //	mov ds, bx		limit 4 GiB
	add(0x24, 0xFE)                   //	and al, 0xFE
	add(0x0F, 0x22, 0xC0)             //	mov cr0, eax		real mode again
	add(0x31, 0xDB)                   //	xor bx, bx
	add(0x8E, 0xDB)                   //	mov ds, bx		the limit stays
	add(0x66, 0xBE)                   //	mov esi, dirtyFrom
	add32(dirtyFrom)
	page := len(code)
	add(0x67, 0x66, 0xFF, 0x06) // page:	inc dword [esi]
	add(0x66, 0x81, 0xC6)       //	add esi, 4096
	add32(4096)
	add(0x66, 0x81, 0xFE) //	cmp esi, dirtyTo
	add32(dirtyTo)
	add(0x72, byte(page-len(code)-2))  //	jb page
	add(0xFB)                          //	sti
	add(0xF4)                          //	hlt
	add(0xEB, byte(again-len(code)-2)) //	jmp again

	sector := make([]byte, 512)
	copy(sector, code)
	// At 0x1D0 (0x7DD0 in memory) the table of descriptors: none, and flat
	// data. At 0x1E0 what lgdt loads: its size less one, and its address.
	copy(sector[0x1D8:], []byte{0xFF, 0xFF, 0, 0, 0, 0x92, 0xCF, 0})
	copy(sector[0x1E0:], []byte{15, 0, 0xD0, 0x7D, 0, 0})
	copy(sector[0x1FE:], []byte{0x55, 0xAA})
	return sector
}
