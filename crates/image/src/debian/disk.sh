# Turns the root directory $1, with all packages installed, into a disk: the file that is standard input.
# $2: name of the host. $3: options for mke2fs.
set -eu
root=$1 hostname=$2 options=$3
# From here on nobody reads the disk by mistake.
exec 9<&0 </dev/null

# --- what makes a machine of it

# The consoles are the owner's: root logs in there without a password. Others (such as sshd) refuse empty ones.
chroot "$root" passwd --quiet --delete root

# A virtio console may appear when systemd has looked for consoles already.
cat >"$root/etc/udev/rules.d/80-hvc0.rules" <<EOF
SUBSYSTEM=="tty", KERNEL=="hvc0", ENV{SYSTEMD_WANTS}+="serial-getty@hvc0.service"
EOF

printf '%s\n' "$hostname" >"$root/etc/hostname"
cat >"$root/etc/hosts" <<EOF
127.0.0.1 localhost
127.0.1.1 $hostname
::1 localhost ip6-localhost ip6-loopback
ff02::1 ip6-allnodes
ff02::2 ip6-allrouters
EOF

# The host runs commands through the agent (`berth exec`), in VMs that have vsock: there this device appears.
if [ -f "$root/usr/sbin/berth-agent" ]; then
    chown 0:0 "$root/usr/sbin/berth-agent"
    chmod 0755 "$root/usr/sbin/berth-agent"
    cat >"$root/etc/systemd/system/berth-agent.service" <<EOF
[Unit]
Description=Agent of Berth, which runs commands for the host

[Service]
ExecStart=/usr/sbin/berth-agent
Restart=on-failure
RestartSec=1
# What it runs is not ended with it.
KillMode=process
EOF
    cat >"$root/etc/udev/rules.d/80-berth-agent.rules" <<EOF
SUBSYSTEM=="misc", KERNEL=="vsock", TAG+="systemd", ENV{SYSTEMD_WANTS}+="berth-agent.service"
EOF
fi

# Every network interface asks for an address.
cat >"$root/etc/systemd/network/80-dhcp.network" <<EOF
[Match]
Type=ether

[Network]
DHCP=yes
EOF
chroot "$root" systemctl --quiet enable systemd-networkd.service systemd-resolved.service
ln -sf ../run/systemd/resolve/stub-resolv.conf "$root/etc/resolv.conf"

# Each VM has a key of its own.
if [ -d "$root/etc/ssh" ]; then
    rm -f "$root"/etc/ssh/ssh_host_*
    mkdir -p "$root/etc/systemd/system/ssh.service.d"
    cat >"$root/etc/systemd/system/ssh.service.d/host-keys.conf" <<EOF
[Service]
ExecStartPre=
ExecStartPre=/usr/bin/ssh-keygen -A
ExecStartPre=/usr/sbin/sshd -t
EOF
fi

# Each VM finds an identity at its first boot (machine-id(5)).
: >"$root/etc/machine-id"
rm -f "$root/var/lib/dbus/machine-id"

# --- what the build left

rm -f "$root/etc/apt/apt.conf.d/99mmdebstrap"
rm -rf "$root"/var/lib/apt/lists/* "$root"/var/cache/apt/archives/*.deb "$root"/var/cache/apt/*.bin
rm -f "$root"/var/log/dpkg.log "$root"/var/log/alternatives.log "$root"/var/log/apt/* "$root"/var/log/bootstrap.log
# mmdebstrap removes its own settings later, and not if they are missing. In /tmp the disk does not get them.
settings=etc/apt/apt.conf.d/00mmdebstrap
mv "$root/$settings" "$root/tmp/settings"

# --- the disk

# mke2fs copies a directory with all that is mounted in it. A bind mount shows the directory alone, and empty file
# systems cover what belongs to the machine that builds. All of it is gone with the mount name space.
export root options
unshare --mount --propagation private sh -eu -c '
    mount --bind "$root" "$root/mnt"
    for directory in dev run tmp; do
        mount -t tmpfs -o "mode=$([ $directory = tmp ] && echo 1777 || echo 0755)" none "$root/mnt/$directory"
    done
    mke2fs $options -d "$root/mnt" /proc/self/fd/9
'

mv "$root/tmp/settings" "$root/$settings"
