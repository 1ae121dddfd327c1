//! A guest in one boot sector, for proofs without an image, and for tests of hypervisors.
//!
//! It does what a guest of ours does first, and where broken hypervisors give up: it goes to long mode, compares and
//! exchanges 16 bytes under a lock (the Linux kernel's slab allocator does; `kvm_pvm` cannot emulate it), adds in an
//! SSE register, and turns a loop ten million times, which tells a processor from an emulator. Then it says its line,
//! and all of it again with each second of the clock. In between it echoes what it receives, and `q` powers the
//! machine off. BIOS only; its page tables are at 0x1000 to 0x3fff, what it exchanges at 0x5000.

/// What the sector prints before its work.
pub const BEGINS: &str = "dayfly: boot sector begins\r\n";

/// What it prints after it.
pub const LINE: &str = "dayfly: boot sector runs\r\n";

/// What it prints if a result is not what it should be; it stops then.
pub const WRONG: &str = "dayfly: boot sector: a wrong result\r\n";

/// Its code, at 0x7c00; operands as GNU's assembler writes them, the target last. [`BEGINS`], [`WRONG`] and [`LINE`]
/// follow, each with a zero.
#[rustfmt::skip]
const CODE: &[u8] = &[
    0xfa,                                       //       cli
    0xfc,                                       //       cld
    0x31, 0xc0,                                 //       xor ax, ax
    0x8e, 0xd8,                                 //       mov ax, ds
    0x8e, 0xc0,                                 //       mov ax, es
    0x8e, 0xd0,                                 //       mov ax, ss
    0xbc, 0x00, 0x7c,                           //       mov 0x7c00, sp
    0xea, 0x12, 0x7c, 0x00, 0x00,               //       ljmp 0, ser
    0xba, 0xfb, 0x03,                           // ser:  mov 0x3fb, dx
    0xb0, 0x80,                                 //       mov 0x80, al
    0xee,                                       //       out al, dx
    0xba, 0xf8, 0x03,                           //       mov 0x3f8, dx
    0xb0, 0x01,                                 //       mov 1, al
    0xee,                                       //       out al, dx
    0x42,                                       //       inc dx
    0x30, 0xc0,                                 //       xor al, al
    0xee,                                       //       out al, dx
    0xba, 0xfb, 0x03,                           //       mov 0x3fb, dx
    0xb0, 0x03,                                 //       mov 3, al
    0xee,                                       //       out al, dx
    0x31, 0xc0,                                 //       xor ax, ax
    0xbf, 0x00, 0x10,                           //       mov 0x1000, di
    0xb9, 0x00, 0x18,                           //       mov 0x1800, cx
    0xf3, 0xab,                                 //       rep stosw
    0xc7, 0x06, 0x00, 0x10, 0x03, 0x20,         //       movw 0x2003, 0x1000
    0xc7, 0x06, 0x00, 0x20, 0x03, 0x30,         //       movw 0x3003, 0x2000
    0xc7, 0x06, 0x00, 0x30, 0x83, 0x00,         //       movw 0x0083, 0x3000
    0x0f, 0x01, 0x16, 0x48, 0x7d,               //       lgdt gdtr
    0x0f, 0x20, 0xe0,                           //       mov cr4, eax
    0x0d, 0x20, 0x06,                           //       or 0x620, ax
    0x0f, 0x22, 0xe0,                           //       mov eax, cr4
    0x66, 0xb8, 0x00, 0x10, 0x00, 0x00,         //       mov 0x1000, eax
    0x0f, 0x22, 0xd8,                           //       mov eax, cr3
    0x66, 0xb9, 0x80, 0x00, 0x00, 0xc0,         //       mov 0xc0000080, ecx
    0x0f, 0x32,                                 //       rdmsr
    0x0d, 0x00, 0x01,                           //       or 0x100, ax
    0x0f, 0x30,                                 //       wrmsr
    0x0f, 0x20, 0xc0,                           //       mov cr0, eax
    0x24, 0xfb,                                 //       and 0xfb, al
    0x66, 0x0d, 0x03, 0x00, 0x00, 0x80,         //       or 0x80000003, eax
    0x0f, 0x22, 0xc0,                           //       mov eax, cr0
    0xea, 0x7b, 0x7c, 0x08, 0x00,               //       ljmp 8, long
    0xbe, 0x4e, 0x7d, 0x00, 0x00,               // long: mov begin, esi
    0xe8, 0x87, 0x00, 0x00, 0x00,               //       call puts
    0xbf, 0x00, 0x50, 0x00, 0x00,               //       mov 0x5000, edi
    0x31, 0xc0,                                 //       xor eax, eax
    0x31, 0xd2,                                 //       xor edx, edx
    0x48, 0x89, 0x07,                           //       mov rax, (rdi)
    0x48, 0x89, 0x47, 0x08,                     //       mov rax, 8(rdi)
    0xbb, 0x01, 0x00, 0x00, 0x00,               //       mov 1, ebx
    0xb9, 0x02, 0x00, 0x00, 0x00,               //       mov 2, ecx
    0xf0, 0x48, 0x0f, 0xc7, 0x0f,               //       lock cmpxchg16b (rdi)
    0x75, 0x52,                                 //       jnz bad
    0x83, 0x7f, 0x08, 0x02,                     //       cmpl 2, 8(rdi)
    0x75, 0x4c,                                 //       jne bad
    0x66, 0x0f, 0x6e, 0xc3,                     //       movd ebx, xmm0
    0x66, 0x0f, 0xfe, 0xc0,                     //       paddd xmm0, xmm0
    0x66, 0x0f, 0x7e, 0xc0,                     //       movd xmm0, eax
    0x39, 0xc8,                                 //       cmp ecx, eax
    0x75, 0x3c,                                 //       jne bad
    0xb9, 0x80, 0x96, 0x98, 0x00,               //       mov 10000000, ecx
    0xff, 0xc9,                                 // turn: dec ecx
    0x75, 0xfc,                                 //       jnz turn
    0xbe, 0x91, 0x7d, 0x00, 0x00,               //       mov line, esi
    0xe8, 0x3d, 0x00, 0x00, 0x00,               //       call puts
    0xe8, 0x31, 0x00, 0x00, 0x00,               //       call second
    0x88, 0xc3,                                 //       mov al, bl
    0x66, 0xba, 0xfd, 0x03,                     // wait: mov 0x3fd, dx
    0xec,                                       //       in dx, al
    0xa8, 0x01,                                 //       test 1, al
    0x74, 0x0e,                                 //       jz none
    0x66, 0xba, 0xf8, 0x03,                     //       mov 0x3f8, dx
    0xec,                                       //       in dx, al
    0x3c, b'q',                                 //       cmp 'q', al
    0x74, 0x44,                                 //       je off
    0xe8, 0x2c, 0x00, 0x00, 0x00,               //       call put
    0xe8, 0x13, 0x00, 0x00, 0x00,               // none: call second
    0x38, 0xd8,                                 //       cmp bl, al
    0x74, 0xe0,                                 //       je wait
    0xeb, 0x83,                                 //       jmp long
    0xbe, 0x6b, 0x7d, 0x00, 0x00,               // bad:  mov wrong, esi
    0xe8, 0x0a, 0x00, 0x00, 0x00,               //       call puts
    0xf4,                                       // halt: hlt
    0xeb, 0xfd,                                 //       jmp halt
    0x31, 0xc0,                                 // second: xor eax, eax
    0xe6, 0x70,                                 //       out al, 0x70
    0xe4, 0x71,                                 //       in 0x71, al
    0xc3,                                       //       ret
    0xac,                                       // puts: lodsb
    0x84, 0xc0,                                 //       test al, al
    0x74, 0x07,                                 //       jz done
    0xe8, 0x03, 0x00, 0x00, 0x00,               //       call put
    0xeb, 0xf4,                                 //       jmp puts
    0xc3,                                       // done: ret
    0x88, 0xc4,                                 // put:  mov al, ah
    0x66, 0xba, 0xfd, 0x03,                     //       mov 0x3fd, dx
    0xec,                                       // full: in dx, al
    0xa8, 0x20,                                 //       test 0x20, al
    0x74, 0xfb,                                 //       jz full
    0x88, 0xe0,                                 //       mov ah, al
    0x66, 0xba, 0xf8, 0x03,                     //       mov 0x3f8, dx
    0xee,                                       //       out al, dx
    0xc3,                                       //       ret
    0x66, 0xba, 0x04, 0x06,                     // off:  mov 0x604, dx
    0x66, 0xb8, 0x00, 0x20,                     //       mov 0x2000, ax
    0x66, 0xef,                                 //       out ax, dx
    0xeb, 0xca,                                 //       jmp halt
    0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,// gdt:  a null descriptor
    0x00, 0x00, 0x00, 0x00, 0x00, 0x9a, 0x20, 0x00,//       64-bit code
    0x0f, 0x00, 0x38, 0x7d, 0x00, 0x00,         // gdtr:
];

/// Smallest cluster that qcow2 allows.
const CLUSTER: usize = 512;

/// Size of the disk: one of a single sector has a geometry that SeaBIOS does not boot from.
const DISK_BYTES: u64 = 1 << 20;

/// A qcow2 image (version 2) of a 1 MiB disk that holds the boot sector: six clusters, in order
/// header, refcount table, refcount block, L1 table, L2 table, the sector.
#[must_use]
pub fn disk_image() -> Vec<u8> {
    const COPIED: u64 = 1 << 63;
    let at = |cluster: u64| cluster * CLUSTER as u64;
    let mut header = b"QFI\xfb".to_vec();
    header.extend(2_u32.to_be_bytes()); // version
    header.extend([0; 12]); // no backing file
    header.extend(9_u32.to_be_bytes()); // cluster bits
    header.extend(DISK_BYTES.to_be_bytes());
    header.extend(0_u32.to_be_bytes()); // not encrypted
    header.extend(32_u32.to_be_bytes()); // L1 entries: each L2 table leads to 64 clusters
    header.extend(at(3).to_be_bytes()); // L1 table
    header.extend(at(1).to_be_bytes()); // refcount table
    header.extend(1_u32.to_be_bytes()); // its clusters
    header.extend([0; 12]); // no snapshots

    let mut sector = CODE.to_vec();
    for text in [BEGINS, WRONG, LINE] {
        sector.extend(text.as_bytes());
        sector.push(0);
    }
    sector.resize(CLUSTER - 2, 0);
    sector.extend([0x55, 0xaa]);

    let refcounts = [1_u16; 6].iter().flat_map(|count| count.to_be_bytes()).collect();
    let clusters = [
        header,
        at(2).to_be_bytes().to_vec(),
        refcounts,
        (at(4) | COPIED).to_be_bytes().to_vec(),
        (at(5) | COPIED).to_be_bytes().to_vec(),
        sector,
    ];
    let mut image = Vec::with_capacity(clusters.len() * CLUSTER);
    for mut cluster in clusters {
        cluster.resize(CLUSTER, 0);
        image.extend(cluster);
    }
    image
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_image_is_six_clusters_with_the_sector_last() {
        let image = disk_image();
        assert_eq!(image.len(), 6 * CLUSTER);
        // Where the code looks for its texts, at 0x7c00.
        let texts = [BEGINS, WRONG, LINE].map(|text| text.len() + 1);
        assert_eq!([CODE.len(), CODE.len() + texts[0], CODE.len() + texts[0] + texts[1]], [0x14e, 0x16b, 0x191]);
        assert!(image[5 * CLUSTER + CODE.len()..].starts_with(BEGINS.as_bytes()));
        assert!(image.ends_with(&[0x55, 0xaa]));
    }
}
