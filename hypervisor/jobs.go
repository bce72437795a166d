package hypervisor

import (
	"context"
	"fmt"
	"math"
	"time"

	"github.com/digitalocean/go-libvirt"

	"belay/agent/maint"
)

// Job gives the statistics of the domain's running job. Without one the Job is
// not active and its State "none"; that is not an error. Of an incoming
// migration libvirt tells nothing but that it is there. It wraps
// maint.ErrNoGuest.
//
// Source: virDomainGetJobStats, and virDomainGetState for post-copy.
func (h *Host) Job(ctx context.Context, uuid string) (maint.Job, error) {
	var job maint.Job
	err := h.onDomain(ctx, uuid, func(s *session, d libvirt.Domain) (err error) {
		if job, err = s.job(d); err != nil || job.Operation != migrationOut {
			return err
		}
		_, reason, err := s.state(d)
		switch reason {
		case "post-copy":
			job.PostCopy = maint.PostCopyRunning
		case "post-copy failed":
			job.PostCopy = maint.PostCopyBroken
		}
		return err
	})
	return job, err
}

// CompletedJob gives the statistics of the domain's last job that succeeded,
// and leaves them there to be read again. It wraps maint.ErrNoJob when there
// are none: none ended, it was aborted, or libvirtd was restarted since. After a
// migration they are on the destination, and the source's domain may be gone.
//
// Source: virDomainGetJobStats with VIR_DOMAIN_JOB_STATS_COMPLETED and
// VIR_DOMAIN_JOB_STATS_KEEP_COMPLETED.
func (h *Host) CompletedJob(ctx context.Context, uuid string) (maint.Job, error) {
	var job maint.Job
	err := h.onDomain(ctx, uuid, func(s *session, d libvirt.Domain) (err error) {
		job, err = s.jobStats(d, libvirt.DomainJobStatsCompleted|libvirt.DomainJobStatsKeepCompleted)
		if err == nil && job.State == jobState(int32(libvirt.DomainJobNone)) {
			return NewError("DomainGetJobStats", s.conn.socket, 0, "no completed job", maint.ErrNoJob)
		}
		return err
	})
	return job, err
}

// AbortJob cancels the domain's outgoing migration, which leaves the guest
// running where it is. It returns when libvirt has passed the request on, not
// when the job is over. It wraps maint.ErrNoJob when there is none, when the
// job is of another kind, or the domain is not active. An incoming migration cannot be aborted
// from this side: ErrIncoming.
//
// Source: virDomainAbortJob.
func (h *Host) AbortJob(ctx context.Context, uuid string) error {
	const op = "DomainAbortJob"
	return h.onDomain(ctx, uuid, func(s *session, d libvirt.Domain) error {
		noJob := NewError(op, s.conn.socket, 0, "no job to abort", maint.ErrNoJob)
		// libvirt would let an abort of an incoming migration wait for its
		// end, and has one answer, "operation invalid", to several things.
		job, err := s.job(d)
		switch {
		case err != nil:
			return err
		case !job.Active:
			return noJob
		case job.Operation == migrationIn:
			return fmt.Errorf("cannot abort the job of %s: %w", d.Name, ErrIncoming)
		case job.Operation != migrationOut: // somebody's backup, dump or save
			return noJob
		}
		_, err = call(s, op, func(l *libvirt.Libvirt) (struct{}, error) {
			return struct{}{}, l.DomainAbortJob(d)
		})
		if isCode(err, libvirt.ErrOperationInvalid) {
			// Either the job has ended meanwhile or it is of a kind that
			// cannot be aborted.
			if job, jobErr := s.job(d); jobErr == nil && !job.Active {
				return noJob
			}
		}
		return err
	})
}

// idle returns ErrBusy if the domain has a job.
func (s *session) idle(d libvirt.Domain) error {
	job, err := s.job(d)
	if err == nil && job.Active {
		err = fmt.Errorf("guest %s: %w (%s)", d.Name, ErrBusy, job.Operation)
	}
	return err
}

// job gives the running job.
func (s *session) job(d libvirt.Domain) (maint.Job, error) {
	job, err := s.jobStats(d, 0)
	switch {
	case isCode(err, libvirt.ErrOperationUnsupported):
		// "migration statistics are available only on the source host"
		return maint.Job{
			Active: true, Operation: migrationIn,
			State: jobState(int32(libvirt.DomainJobUnbounded)),
		}, nil
	case isCode(err, libvirt.ErrOperationInvalid):
		// The domain is not active.
		return maint.Job{State: jobState(int32(libvirt.DomainJobNone))}, nil
	}
	return job, err
}

func (s *session) jobStats(d libvirt.Domain, flags libvirt.DomainGetJobStatsFlags) (maint.Job, error) {
	return call(s, "DomainGetJobStats", func(l *libvirt.Libvirt) (maint.Job, error) {
		kind, params, err := l.DomainGetJobStats(d, flags)
		if err != nil {
			return maint.Job{}, err
		}
		return jobOf(kind, params), nil
	})
}

// jobOf reads the statistics of a job.
func jobOf(kind int32, params []libvirt.TypedParam) maint.Job {
	job := maint.Job{
		State: jobState(kind),
		Active: kind == int32(libvirt.DomainJobBounded) ||
			kind == int32(libvirt.DomainJobUnbounded),
	}
	var dirtyPages, pageSize uint64
	for _, p := range params {
		n := number(p.Value.I)
		switch p.Field {
		case libvirt.DomainJobOperationStr:
			job.Operation = jobOperation(int32(n))
		case libvirt.DomainJobTimeElapsed:
			job.Elapsed = milliseconds(n)
		case libvirt.DomainJobDowntime:
			job.Downtime = milliseconds(n)
		case libvirt.DomainJobSetupTime:
			job.Setup = milliseconds(n)
		case libvirt.DomainJobMemoryTotal:
			job.MemoryTotal = n
		case libvirt.DomainJobMemoryProcessed:
			job.MemorySent = n
		case libvirt.DomainJobMemoryRemaining:
			job.MemoryLeft = n
		case libvirt.DomainJobMemoryBps:
			job.BytesPerSecond = n
		case libvirt.DomainJobMemoryDirtyRate:
			dirtyPages = n
		case libvirt.DomainJobMemoryPageSize:
			pageSize = n
		case libvirt.DomainJobMemoryIteration:
			job.Iteration = n
		case libvirt.DomainJobDiskTotal:
			job.DiskTotal = n
		case libvirt.DomainJobDiskRemaining:
			job.DiskLeft = n
		case libvirt.DomainJobDiskBps:
			job.DiskPerSecond = n
		case libvirt.DomainJobAutoConvergeThrottle:
			job.SlowedPercent = int(min(n, 100))
		}
	}
	job.DirtyPerSecond = dirtyPages * pageSize
	if pageSize > 0 && dirtyPages > math.MaxUint64/pageSize {
		job.DirtyPerSecond = math.MaxUint64
	}
	if job.State == jobState(int32(libvirt.DomainJobNone)) {
		job.Operation = ""
	}
	return job
}

// milliseconds is a duration, the longest there is for one that does not fit.
func milliseconds(n uint64) time.Duration {
	return time.Duration(min(n, math.MaxInt64/uint64(time.Millisecond))) * time.Millisecond
}

// number gives the integer in a typed parameter, 0 if it is not one. libvirt
// has changed the width of some over the years.
func number(v any) uint64 {
	switch v := v.(type) {
	case int32:
		return uint64(max(v, 0))
	case uint32:
		return uint64(v)
	case int64:
		return uint64(max(v, 0))
	case uint64:
		return v
	}
	return 0
}
