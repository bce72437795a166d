package api

import (
	"context"

	"belay/agent/maint"
)

func disksPath(op maint.OpID) string { return "/v1/peer/disks/" + segment(string(op)) }

// CheckFiles asks a peer which files are the same storage there.
func (c *Client) CheckFiles(ctx context.Context, q maint.FilesQuestion) (views []maint.FileView, err error) {
	return views, c.call(ctx, "POST", "/v1/peer/files", q, &views)
}

// MakeDisks asks a peer to make what the disks of a reservation are copied into.
func (c *Client) MakeDisks(ctx context.Context, op maint.OpID) error {
	return c.call(ctx, "PUT", disksPath(op), nil, nil)
}

// RemoveDisks tells a peer that the guest has not moved, and to remove them.
func (c *Client) RemoveDisks(ctx context.Context, op maint.OpID) error {
	return c.call(ctx, "DELETE", disksPath(op), nil, nil)
}

// MoveEnd asks a peer how an operation of its own ended that was to move a guest here.
func (c *Client) MoveEnd(ctx context.Context, op maint.OpID) (end maint.MoveEnd, err error) {
	return end, c.call(ctx, "GET", "/v1/peer/moves/"+segment(string(op)), nil, &end)
}
