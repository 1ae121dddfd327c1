#!/bin/sh
# Turns the guest into one that starts by itself. mmdebstrap runs it outside of the new root, as the root of that root: $1 is
# where it is. Beside this script: `cmdline` (the kernel's). What it leaves in /.dayfly the build puts in front of the
# root file system; that directory leaves with seal.sh's own.
set -eu
root=$1
here=$(dirname "$0")

# What the machine has, and no more: it is the same for all. pvpanic tells the hypervisor of a panic.
mkdir -p "$root/etc/initramfs-tools/conf.d"
printf 'MODULES=list\nCOMPRESS=zstd\nRESUME=none\nFSTYPE=ext4\n' > "$root/etc/initramfs-tools/conf.d/dayfly"
cat >> "$root/etc/initramfs-tools/modules" <<'END'
virtio_pci
virtio_blk
virtio_net
virtio_console
virtio_rng
ext4
pvpanic
pvpanic_mmio
END
chroot "$root" update-initramfs -u -k all

# The links lead to the newest kernel, whoever installs one.
[ -e "$root/vmlinuz" ] && [ -e "$root/initrd.img" ] || { echo "recipe: the kernel's package has made no /vmlinuz and /initrd.img" >&2; exit 1; }
mkdir -p "$root/boot/grub" "$root/.dayfly"
cat > "$root/boot/grub/grub.cfg" <<END
serial --unit=0 --speed=115200
terminal_output serial
linux /vmlinuz $(cat "$here/cmdline")
initrd /initrd.img
boot
END
chroot "$root" grub-mkimage -O i386-pc -p '(hd0,gpt2)/boot/grub' -o /.dayfly/core.img \
    biosdisk part_gpt ext2 linux normal serial terminal
cp "$root/usr/lib/grub/i386-pc/boot.img" "$root/.dayfly/boot.img"
