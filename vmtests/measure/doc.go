// Package measure compares ways to move a guest: Belay's and virsh's, on the
// same guest, in the same lab, one after the other.
//
// A [Bed] is a cluster of two hosts, one guest that dirties memory and sends
// heartbeats, and an observer on the LAN that receives them. [Bed.Belay] and
// [Bed.Virsh] each run one command as its user would, a process started outside
// the hosts that speaks to the source's unix socket, and measure
//
//   - the outage: the longest silence of the guest on the LAN, from before the
//     command until the guest has been heard again for a while;
//   - the downtime: what QEMU measured of its own switch-over, which knows
//     nothing of the network;
//   - the total: the command from the start of its process to its exit;
//   - the memory sent.
//
// Both commands find the same hosts: belayd runs on each while virsh is at work
// too, and neither is given a limit or a tuning that the other has not.
//
// For changes of a guest's QEMU there are [Bed.Replace] and [Bed.SaveRestore].
//
// A [Ward] is one host with many guests that are held, by [Ward.Belay] or by
// [Ward.Virsh], a loop of the shell. Its rulers are QEMU's own times of its
// events STOP and RESUME, the heartbeats, and the guests' word on their clocks.
//
// A [Flock] is several guests of two hosts or more, that are moved or updated together;
// [Flock.Feel] tells what the LAN saw of each while anything was done.
package measure
