//! A guest that ends itself in every way that a guest can: a boot sector, and the same as a script for the fake.
//!
//! It speaks and listens as the product's own sector does ([`dayfly::vm::proof::sector`]): it prints [`LINE`] twice a second, and echoes
//! what it receives on the serial console, but for these letters:
//!
//! | letter | does |
//! | --- | --- |
//! | `q` | powers the machine off: ACPI S5 |
//! | `r` | restarts it: the chip set's reset register |
//! | `s` | suspends it to RAM: ACPI S3, by the register, whatever ACPI's tables offer |
//! | `p` | says on the panic device that its kernel panicked |

use dayfly::vm::proof::sector::{LINE, disk_image};
use dayfly_doubles::fake::GuestMachine;
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::timeout;

/// 16-bit real mode, loaded at 0x7c00; the line follows.
#[rustfmt::skip]
const CODE: &[u8] = &[
    0xfa,                               //      cli
    0x31, 0xc0,                         //      xor  ax, ax
    0x8e, 0xd8,                         //      mov  ds, ax
    0x8e, 0xd0,                         //      mov  ss, ax
    0xbc, 0x00, 0x7c,                   //      mov  sp, 0x7c00
    0xea, 0x0f, 0x7c, 0x00, 0x00,       //      jmp  0:0x7c0f
    0xba, 0xfb, 0x03,                   //      mov  dx, 0x3fb      COM1, line control:
    0xb0, 0x80, 0xee,                   //      out  dx, 0x80         divisor next
    0xba, 0xf8, 0x03,                   //      mov  dx, 0x3f8
    0xb0, 0x01, 0xee,                   //      out  dx, 1            115200 baud
    0x42, 0x30, 0xc0, 0xee,             //      out  dx + 1, 0
    0xba, 0xfb, 0x03,                   //      mov  dx, 0x3fb
    0xb0, 0x03, 0xee,                   //      out  dx, 3            8 data bits, no parity, 1 stop bit
    0xfb,                               //      sti
    0xbe, 0x8b, 0x7c,                   // say: mov  si, line
    0xac,                               // nxt: lodsb
    0x84, 0xc0,                         //      test al, al
    0x74, 0x05,                         //      jz   end
    0xe8, 0x2b, 0x00,                   //      call put
    0xeb, 0xf6,                         //      jmp  nxt
    0xb9, 0x09, 0x00,                   // end: mov  cx, 9
    0xf4,                               // slp: hlt                  until the next tick
    0xba, 0xfd, 0x03,                   // get: mov  dx, 0x3fd       COM1, line status
    0xec,                               //      in   al, dx
    0xa8, 0x01,                         //      test al, 1           anything received?
    0x74, 0x19,                         //      jz   tck
    0xba, 0xf8, 0x03,                   //      mov  dx, 0x3f8
    0xec,                               //      in   al, dx
    0x3c, b'q', 0x74, 0x26,             //      je   off
    0x3c, b'r', 0x74, 0x30,             //      je   rst
    0x3c, b'p', 0x74, 0x34,             //      je   pan
    0x3c, b's', 0x74, 0x23,             //      je   s3
    0xe8, 0x06, 0x00,                   //      call put
    0xeb, 0xdf,                         //      jmp  get
    0xe2, 0xdc,                         // tck: loop slp
    0xeb, 0xca,                         //      jmp  say
    0x88, 0xc4,                         // put: mov  ah, al
    0xba, 0xfd, 0x03,                   //      mov  dx, 0x3fd
    0xec,                               // ful: in   al, dx
    0xa8, 0x20,                         //      test al, 0x20        room to send?
    0x74, 0xfb,                         //      jz   ful
    0x88, 0xe0,                         //      mov  al, ah
    0xba, 0xf8, 0x03,                   //      mov  dx, 0x3f8
    0xee,                               //      out  dx, al
    0xc3,                               //      ret
    0xb8, 0x00, 0x20,                   // off: mov  ax, 0x2000      sleep enable, type 0: QEMU's S5
    0xba, 0x04, 0x06,                   // pm:  mov  dx, 0x604       ACPI PM1a control, where SeaBIOS puts it
    0xef,                               //      out  dx, ax
    0xeb, 0xc1,                         //      jmp  get
    0xb8, 0x00, 0x24,                   // s3:  mov  ax, 0x2400      sleep enable, type 1: QEMU's S3
    0xeb, 0xf5,                         //      jmp  pm
    0xba, 0xf9, 0x0c,                   // rst: mov  dx, 0xcf9       ICH9 reset control
    0xb0, 0x06, 0xee,                   //      out  dx, 6
    0xeb, 0xf8,                         //      jmp  rst
    0xba, 0x05, 0x05,                   // pan: mov  dx, 0x505       QEMU's panic device
    0xb0, 0x01, 0xee,                   //      out  dx, 1           panicked
    0xeb, 0xac,                         //      jmp  get
]; // line:

/// The product's disk image, with this sector in place of its own, which is the last 512 bytes.
pub(crate) fn disk() -> Vec<u8> {
    assert_eq!(CODE.len(), 0x8b, "where the code looks for the line");
    let mut image = disk_image();
    let start = image.len() - 512;
    let sector = &mut image[start..];
    assert!(sector.ends_with(&[0x55, 0xaa]), "a boot sector is there");
    sector[..510].fill(0);
    sector[..CODE.len()].copy_from_slice(CODE);
    sector[CODE.len()..CODE.len() + LINE.len()].copy_from_slice(LINE.as_bytes());
    image
}

/// The same, for the fake.
pub(crate) async fn script(mut machine: GuestMachine) {
    loop {
        machine.console.write_all(LINE.as_bytes()).await.unwrap();
        if let Ok(byte) = timeout(Duration::from_millis(495), machine.console.read_u8()).await {
            match byte.unwrap() {
                b'q' => return,
                b'r' => machine.power.reboot(),
                b's' => machine.power.sleep(),
                b'p' => machine.power.panic(),
                byte => machine.console.write_u8(byte).await.unwrap(),
            }
        }
    }
}
