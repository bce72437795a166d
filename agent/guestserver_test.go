package agent

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
)

// A guest's agent says what it likes of its addresses.
func TestAddressesOfAHostileAgent(t *testing.T) {
	t.Parallel()
	var ips []string
	for i := range 10_000 {
		ips = append(ips, fmt.Sprintf(`{"ip-address":"10.0.%d.%d"}`, i>>8, i&255))
	}
	of := func(ips string) string {
		return `[{"hardware-address":"52:54:00:AA:00:01","ip-addresses":[` + ips + `]}]`
	}
	for answer, want := range map[string]int{
		of(strings.Join(ips, ",")):                 maxAddrs,
		of(`{"ip-address":"fe80::1%\u001b[2J"}`):   0,
		of(`{"ip-address":"127.0.0.1"}`):           0,
		of(`{"ip-address":"10.0.0.1"},{"x":[[]]}`): 1,
		of(`{"ip-address":7}`):                     0,
		strings.Repeat("[", 100_000):               0,
		`null`:                                     0,
		``:                                         0,
	} {
		if got := addresses(json.RawMessage(answer))["52:54:00:aa:00:01"]; len(got) != want {
			t.Errorf("%.80s: %d addresses, not %d", answer, len(got), want)
		}
	}
}
