#!/bin/sh
# What the guest agent runs: shutdown -P|-H|-r +0 message. Nothing here needs
# an orderly stop but the disk.
sync
case $1 in
-r) exec /bin/reboot -f ;;
-H) exec /bin/halt -f ;;
*) exec /bin/poweroff -f ;;
esac
