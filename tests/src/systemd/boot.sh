# Boots systemd as a container: a small Debian below, a tmpfs above it, namespaces of its own but for the network, which
# is that of whoever starts this. Run by container.rs with: NAME BASE WORK [FROM TO]...
#
# Everything that is mounted here is mounted in a namespace that ends with the container.
set -eu
name=$1 base=$2 work=$3

if [ "${4:-}" != inner ]; then
    # A cgroup of its own, so that several containers do not take each other's units for their own.
    shift 3
    mount --make-rprivate /
    cgroups=$work/cgroups
    mkdir -p "$cgroups"
    mount -t cgroup2 none "$cgroups"
    remove_cgroups() {
        # The last processes may take a moment to go.
        for _ in 1 2 3 4 5 6 7 8 9 10; do
            find "$cgroups/$name" -depth -type d -exec rmdir {} + 2>/dev/null || true
            [ -d "$cgroups/$name" ] || return 0
            sleep 0.1
        done
    }
    remove_cgroups
    mkdir -p "$cgroups/$name"
    (
        read -r own _ </proc/self/stat
        echo "$own" >"$cgroups/$name/cgroup.procs"
        exec unshare --pid --fork --kill-child --mount --uts --ipc --cgroup \
            sh "$BOOT_SCRIPT" "$name" "$base" "$work" inner "$@"
    ) &
    container=$!
    # Told to end, or left by its starter: without this process the container has no first one, and ends.
    trap 'kill -KILL "$container"' TERM INT
    wait "$container" || true
    wait "$container" || true
    remove_cgroups || true
    exit 0
fi
shift 4

mount --make-rprivate /
mkdir -p "$work/layer"
mount -t tmpfs -o mode=755 none "$work/layer"
mkdir "$work/layer/upper" "$work/layer/work" "$work/layer/root"
root=$work/layer/root
mount -t overlay none -o "lowerdir=$base,upperdir=$work/layer/upper,workdir=$work/layer/work" "$root"
echo "$name" >"$root/etc/hostname"
hostname "$name"

mount -t proc proc "$root/proc"
# The machine's own settings are not the container's to change.
mount --bind "$root/proc/sys" "$root/proc/sys"
mount -o remount,bind,ro "$root/proc/sys"
mount --bind "$root/proc/sys/net" "$root/proc/sys/net"
mount -o remount,bind,rw "$root/proc/sys/net" 2>/dev/null || true
mount -t sysfs -o ro sysfs "$root/sys"
mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
mount -t tmpfs -o mode=755 none "$root/dev"
mkdir "$root/dev/pts" "$root/dev/shm" "$root/dev/net"
mount -t devpts -o newinstance,ptmxmode=0666,mode=620,gid=5 devpts "$root/dev/pts"
ln -s pts/ptmx "$root/dev/ptmx"
ln -s /proc/self/fd "$root/dev/fd"
for device in null zero full random urandom tty kvm net/tun; do
    [ -e "/dev/$device" ] || continue
    touch "$root/dev/$device"
    mount --bind "/dev/$device" "$root/dev/$device"
done
mount -t tmpfs -o mode=1777 none "$root/dev/shm"
mount -t tmpfs -o mode=755 none "$root/run"
mount -t tmpfs -o mode=1777 none "$root/tmp"
while [ $# -ge 2 ]; do
    mkdir -p "$root$2"
    mount --bind "$1" "$root$2"
    shift 2
done

# Of this /proc, which is not yet the container's: the number by which the others know the container's first process.
read -r init _ </proc/self/stat
echo "$init" >"$work/init.partial"
mv "$work/init.partial" "$work/init"
cd "$root"
pivot_root . mnt
umount -l /mnt
exec env -i container=romulus-lab PATH=/usr/sbin:/usr/bin:/sbin:/bin /lib/systemd/systemd --system \
    --log-target=journal --show-status=no
