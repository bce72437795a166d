#!/bin/sh
# build.sh FOLDER SOURCES RELEASE VERSION: makes the modules of SOURCES in FOLDER, for Debian's
# kernel with that uname -r, from the packages of that version ("6.1.192-2"). The kernel's
# headers come from the mirror that apt uses on this machine, and are not installed. It needs
# gcc-12, make and libelf1, as the headers' packages do.
set -eu
out=$1 sources=$2 release=$3 version=$4
abi=$(echo "$release" | sed -E 's/^([0-9.]+-[0-9]+)-.*/\1/')
kernel=$(echo "$release" | cut -d. -f1,2)
headers=linux-headers-$release common=linux-headers-$abi-common

for program in gcc-12 make; do
	command -v "$program" >/dev/null || { echo "build: there is no $program: apt-get install $program libelf1" >&2; exit 1; }
done
work=$(mktemp -d "$out/work.XXXXXX")
cd "$work"
apt-get -q -o APT::Sandbox::User=root download "$headers=$version" "$common=$version" "linux-kbuild-$kernel"
for package in *.deb; do dpkg -x "$package" "$work"; done
# It names the other package's folder where that would be installed.
echo "include $work/usr/src/$common/Makefile" >"usr/src/$headers/Makefile"
cp -R "$sources" modules
make -C "usr/src/$headers" M="$work/modules" modules
cp modules/*.ko "$out/"
cd /
rm -rf "$work"
