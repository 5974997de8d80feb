#!/bin/sh
# Uses every device that the guest has, all the time, and says so on the console: `USE name count`. What was stored and comes
# back changed is told as `BAD name`. What is slow to come back is merely late.
export PATH=/bin

# Writes a pattern, has the kernel forget it, and reads it back from the device.
use_disk() {
    n=0
    dd if=/dev/urandom of=/tmp/$1.pattern bs=64k count=4 2>/dev/null
    while true; do
        n=$((n + 1))
        printf '%8d' $n | dd of=/tmp/$1.pattern bs=8 conv=notrunc 2>/dev/null
        dd if=/tmp/$1.pattern of=/dev/$1 bs=256k seek=$((n % 16)) conv=fsync,notrunc 2>/dev/null
        blockdev --flushbufs /dev/$1
        dd if=/dev/$1 of=/tmp/$1.read bs=256k skip=$((n % 16)) count=1 2>/dev/null
        cmp /tmp/$1.pattern /tmp/$1.read && echo "USE $1 $n" || echo "BAD $1 $n"
        usleep 100000
    done
}

# Asks the host at the other end for an echo. A packet may get lost, as everywhere.
use_card() {
    n=0
    ip link set $1 up
    ip addr add $2.15/24 dev $1
    while true; do
        ping -c 1 -W 5 -s 1000 $2.2 >/dev/null 2>&1 && n=$((n + 1)) && echo "USE $3 $n"
        usleep 100000
    done
}

use_random() {
    n=0
    while true; do
        n=$((n + 1))
        now=$(dd if=/dev/hwrng bs=16 count=1 2>/dev/null | md5sum)
        [ "$now" != "$before" ] && echo "USE rng $n" || echo "BAD rng $n"
        before=$now
        usleep 100000
    done
}

# Each number goes out once: whoever reads them at the other end sees what is missing.
use_port() {
    n=0
    while true; do
        n=$((n + 1))
        echo $n > /dev/$1 && echo "USE port $n"
        usleep 50000
    done
}

# Makes the upper lines of the screen white, with a number after them, and reads them back. The kernel's own console on it is
# put away first, which it may not be at once.
use_screen() {
    n=0
    for console in /sys/class/vtconsole/vtcon*; do
        grep -q frame $console/name && echo 0 > $console/bind
    done
    dd if=/dev/zero bs=64k count=1 2>/dev/null | tr '\0' '\377' > /tmp/screen
    while true; do
        n=$((n + 1))
        printf '%8d' $n | dd of=/tmp/screen bs=8 seek=8191 conv=notrunc 2>/dev/null
        dd if=/tmp/screen of=/dev/fb0 bs=64k conv=notrunc 2>/dev/null
        dd if=/dev/fb0 of=/tmp/screen.read bs=64k count=1 2>/dev/null
        cmp /tmp/screen /tmp/screen.read && echo "USE gpu $n" || echo "BAD gpu $n"
        usleep 300000
    done
}

# An event of three: where to, and that this is all.
use_tablet() {
    n=0
    while dd if=/dev/input/$1 bs=24 count=1 >/dev/null 2>&1; do
        n=$((n + 1))
        echo "USE tablet $n"
    done
}

# The kernel finds some devices only after a while. Those that there are not cost nothing more.
appears() {
    for try in $(seq 300); do
        [ -e "$1" ] && return 0
        usleep 100000
    done
    return 1
}

tablet() {
    for try in $(seq 300); do
        for event in /sys/class/input/event*; do
            grep -q Tablet $event/device/name 2>/dev/null && echo ${event##*/} && return
        done
        usleep 100000
    done
}

for disk in vda sda sdb; do
    appears /dev/$disk && use_disk $disk &
done
for card in eth0 eth1; do
    driver=$(ls -l /sys/class/net/$card/device/driver 2>/dev/null)
    case $driver in
        *e1000e) use_card $card 10.0.3 e1000e & ;;
        *virtio_net) use_card $card 10.0.2 net & ;;
    esac
done
appears /dev/hwrng && use_random &
# Its number counts all virtio devices.
for number in $(seq 0 15); do
    appears /dev/vport${number}p1 && use_port vport${number}p1 &
done
appears /dev/fb0 && use_screen &
(found=$(tablet) && [ -n "$found" ] && use_tablet $found) &
