package leash

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"net"
	"reflect"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"belay/agent/boottime"
	"belay/agent/maint"
)

func TestGarbage(t *testing.T) {
	within(t, newWorld(a), func(bed *bed) {
		bed.arm()
		bed.pause(a)
		before := bed.notes()
		for _, garbage := range []string{"", "{", "null", "[]", "0", `"arm"`, "{}", `{"do":7}`, `{"id":-1,"do":"renew"}`,
			`{"do":"released"}`, `{"do":"released","guests":"` + a + `"}`, `{"do":"left","guests":[null]}`, `{"do":"left","guests":{}}`,
			`{"do":"arm"}`, `{"do":"take","order":null}`, `{"do":"take","order":{"op":"../etc"}}`, "\x00\xff\xfe", strings.Repeat("[", 10000),
			`{"do":"` + strings.Repeat("x", maxRequest-100) + `"}`} {
			if _, err := io.WriteString(bed.conn, garbage+"\n"); err != nil {
				t.Fatal(err)
			}
			var r reply
			if err := bed.in.next(&r); err != nil {
				t.Fatalf("%.40q: %v", garbage, err)
			}
			if r.Problem == nil || r.Problem.Code != maint.CodeBadRequest && r.Problem.Code != maint.CodeNotFound {
				t.Errorf("%.40q: %+v", garbage, r)
			}
		}
		if after := bed.notes(); !reflect.DeepEqual(before, after) {
			t.Errorf("garbage has changed\n%+v into\n%+v", before, after)
		}
		bed.must(request{Do: doRenew}) // the connection is as good as before
	})
}

// A message that does not end is answered once, and the holder cut off.
func TestEndlessMessage(t *testing.T) {
	within(t, newWorld(a), func(bed *bed) {
		bed.arm()
		go func() {
			for { // until it is cut off
				if _, err := bed.conn.Write(bytes.Repeat([]byte("x"), 1<<16)); err != nil {
					return
				}
			}
		}()
		var r reply
		if err := bed.in.next(&r); err != nil || r.Problem == nil || r.Problem.Code != maint.CodeBadRequest {
			t.Fatalf("%+v, %v", r, err)
		}
		if err := bed.in.next(&r); err == nil {
			t.Fatalf("it goes on: %+v", r)
		}
		bed.connect()
		bed.must(request{Do: doRenew})
	})
}

// A holder that reads no answers holds up nobody.
func TestHolderThatDoesNotRead(t *testing.T) {
	within(t, newWorld(a), func(bed *bed) {
		bed.arm()
		bed.pause(a)
		deaf := bed.conn
		go func() { _, _ = deaf.Write(encode(request{ID: 1, Do: doStatus})) }()
		synctest.Wait()
		bed.connect()
		bed.must(request{Do: doRenew})
		bed.runsWithin(3300*time.Millisecond, a)
		time.Sleep(replyTimeout)
		if _, err := deaf.Write([]byte("\n")); err == nil {
			t.Error("it is still being waited for")
		}
	})
}

// FuzzRequests: whatever a holder sends, each line is answered once, in order,
// and what is refused has changed nothing.
func FuzzRequests(f *testing.F) {
	for _, seed := range []string{
		`{"id":1,"do":"renew"}`, `{"id":2,"do":"paused","guests":["` + a + `"]}`, `{"do":"status"}`,
		`{"do":"left","guests":["` + a + `","` + b + `"]}` + "\n" + `{"do":"released","guests":["` + c + `"]}`,
		`{"do":"take","order":{"op":"hold-1","boot_id":"boot-1","deadline_boottime_ns":1,"silence_ns":3000000000,"guests":[{"uuid":"` + a + `","fate":"released"}]}}`,
		"{", "\n\n", `{"id":18446744073709551615,"do":""}`, `{"do":"disarm"}`,
	} {
		f.Add([]byte(seed))
	}
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, sent []byte) {
		k, err := NewKeeper(Config{Dir: dir, Op: testOp, Boot: "boot-1", Host: newWorld(a, b), Clock: boottime.Now, Log: slog.New(slog.DiscardHandler)})
		if err != nil {
			t.Fatal(err)
		}
		k.life = t.Context()
		k.s = &Status{Op: testOp, Boot: "boot-1", Deadline: time.Hour, Silence: time.Second, Guests: []GuestStatus{
			{Guest: Guest{UUID: a, Name: "a"}, Fate: Paused}, {Guest: Guest{UUID: b, Name: "b"}, Fate: Armed}}}
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		ours, theirs := net.Pipe()
		served := make(chan struct{})
		go func() { k.hold(ctx, theirs); close(served) }()
		defer func() { ours.Close(); <-served }()
		answers := newLines(ours, maxReply)
		for line := range bytes.SplitSeq(sent, []byte("\n")) {
			before := k.snapshot()
			if _, err := ours.Write(append(line, '\n')); err != nil {
				t.Fatal(err)
			}
			var r reply
			if err := answers.next(&r); err != nil {
				t.Fatalf("no answer to %q: %v", line, err)
			}
			if after := k.snapshot(); r.Problem != nil && !reflect.DeepEqual(before, after) {
				t.Fatalf("%q is refused (%v) and has changed\n%+v into\n%+v", line, r.Problem, before, after)
			}
		}
	})
}

func (k *Keeper) snapshot() *Status {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.s == nil {
		return nil
	}
	return k.s.clone()
}
