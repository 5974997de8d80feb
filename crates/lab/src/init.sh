#!/bin/sh
# The first process of a lab guest. It reads what to do from the kernel's command line:
#   sterna.ip=ADDRESS/BITS  sterna.run=redis,web,iperf3,game,beacon:CLIENT:PORT,load:--option=value+--option,use,helper
# says READY on the console when all of it runs, and then obeys lines from the console (poweroff, reboot).
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev 2>/dev/null
mount -t tmpfs tmp /tmp
for word in $(cat /proc/cmdline); do
    case $word in
        sterna.ip=*) address=${word#sterna.ip=} ;;
        sterna.run=*) programs=${word#sterna.run=} ;;
    esac
done
for module in $(cat /modules/order); do
    insmod /modules/$module
done
ip link set lo up
if [ -n "$address" ]; then
    ip addr add "$address" dev eth0 && ip link set eth0 up || echo "INIT found no network card"
fi
# Redis asks for it, and a guest whose memory is nearly all in use needs it.
echo 1 > /proc/sys/vm/overcommit_memory

redis() {
    redis-server --bind 0.0.0.0 --protected-mode no --save '' --appendonly no --dir /tmp --logfile /tmp/redis.log \
        --daemonize no >/dev/null 2>&1 &
    until printf 'PING\r\nQUIT\r\n' | nc 127.0.0.1 6379 2>/dev/null | grep -q PONG; do
        usleep 50000
    done
}

web() {
    nginx -c /etc/nginx.conf >/dev/null 2>&1 &
    until printf 'HEAD /file HTTP/1.0\r\n\r\n' | nc 127.0.0.1 80 2>/dev/null | grep -q ' 200 '; do
        usleep 50000
    done
}

IFS=,
for program in $programs; do
    IFS=' '
    case $program in
        redis) redis ;;
        web) web ;;
        iperf3) iperf3 --server >/dev/null 2>&1 & ;;
        game) game & ;;
        beacon:*) beacon "${program#beacon:}" & ;;
        load:*) load $(echo "${program#load:}" | tr + ' ') & ;;
        use) use & ;;
        helper) sterna-guest daemon & ;;
        *) echo "INIT does not know $program" ;;
    esac
done
echo "READY $(cut -d' ' -f1 /proc/uptime)"

# Without a listener on the console this waits for good, which is what the first process should do.
while true; do
    if read -r line; then
        case $line in
            poweroff) poweroff -f ;;
            reboot) reboot -f ;;
            *) sh -c "$line" ;;
        esac
    else
        sleep 1
    fi
done
