package journal

import (
	"encoding/json"
	"testing"

	"belay/agent/maint"
)

// FuzzApply: whatever is in a record, it is taken or refused; what is taken can be shown
// and read again.
func FuzzApply(f *testing.F) {
	for _, s := range []string{`{}`, `null`, `{"kind":"accepted","op":"mig-1","data":{}}`, `{"kind":"accepted","op":"mig-1","data":null}`, `{"kind":"guest-move","op":"mig-1","data":{"guest_uuid":"u","problems":null}}`,
		`{"kind":"guest-move","op":"mig-1","data":[]}`, `{"kind":"seen-to","op":"mig-1"}`, `{"kind":"moved","op":"mig-1","data":"x"}`, `{"kind":"ended","op":"mig-1","data":{"outcome":"flown"}}`,
		`{"kind":"step-done","op":"mig-1","step":"none"}`, `{"kind":"of-tomorrow","op":"mig-1"}`} {
		f.Add([]byte(s))
	}
	for _, k := range []maint.RecordKind{maint.RecReserved, maint.RecReleased, maint.RecArrived, maint.RecDisks, maint.RecEvent, maint.RecCordoned, maint.RecUncordoned, maint.RecPatches} {
		for _, data := range []string{`{}`, `null`, `[]`, `{"state":"made","files":[null]}`, `{"expires":"yesterday"}`} {
			f.Add([]byte(`{"kind":"` + string(k) + `","op":"mig-1","data":` + data + `}`))
		}
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var r maint.Record
		if json.Unmarshal(b, &r) != nil {
			return
		}
		j := &Journal{ops: make(map[maint.OpID]*maint.Op), reserved: make(map[maint.OpID]maint.Reservation), arrived: make(map[maint.OpID]maint.Arrived),
			disks: make(map[maint.OpID]maint.MadeDisks), scheduled: maint.NewScheduled()}
		if err := j.apply(maint.Record{Kind: maint.RecAccepted, Op: "mig-1", Data: json.RawMessage(`{"kind":"migrate"}`)}); err != nil {
			t.Fatal(err)
		}
		for range 2 { // again, as after a copy of the file
			if j.apply(r) != nil {
				return
			}
			if _, err := json.Marshal(j.Ops()); err != nil {
				t.Errorf("operations cannot be shown: %v", err)
			}
			_, _ = j.Arrivals(), j.Disks()
		}
	})
}
