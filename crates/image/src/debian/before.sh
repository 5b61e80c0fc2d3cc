# Runs before all but the essential packages are installed in the root directory $1: what they look at.
set -eu
root=$1

# The file system grows with its disk.
cat >"$root/etc/fstab" <<EOF
/dev/vda / ext4 rw,errors=remount-ro,x-systemd.growfs 0 1
EOF

# An initrd with what a VM needs and no more: it is loaded at each boot.
mkdir -p "$root/etc/initramfs-tools/conf.d" "$root/usr/share/initramfs-tools/modules.d"
printf 'MODULES=list\nCOMPRESS=gzip\n' >"$root/etc/initramfs-tools/conf.d/berth"
printf '%s\n' virtio_pci virtio_blk virtio_console ext4 >"$root/usr/share/initramfs-tools/modules.d/berth"
