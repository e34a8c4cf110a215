-- name: store_event
-- Stores a delivery, or counts one more of a known event, which is then locked. With $11 a new one's locks are taken
-- after that, and what they protect is read: kitrocket.lock_for_snapshot.
-- $1 webhook id, $2 type, $3 subscription, $4 payment, $5 customer, $6 the user its metadata names, $7 event time,
-- $8 now, $9 SHA-256 of the body, $10 the body; $11 subscription, or NULL: no locks, $12 customer, $13 whether the event
-- names a user, $14 the user it names, $15 e-mail address in lower case.
WITH stored AS (
    INSERT INTO kitrocket.webhook_events AS known (
        webhook_id, type, subscription_id, payment_id, customer_id, user_hint, event_at, received_at, body_sha256,
        payload, state, attempts, deliveries, hook_state, hook_attempts
    )
    VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, 'received', 0, 1, 'none', 0)
    ON CONFLICT (webhook_id) DO UPDATE SET deliveries = known.deliveries + 1
    RETURNING
        webhook_id, type, state, attempts, deliveries, body_sha256, subscription_id, hook_state,
        CASE WHEN known.deliveries > 1 THEN known.payload END AS payload
)
SELECT
    *,
    CASE
        WHEN deliveries = 1 AND $11::text IS NOT NULL THEN kitrocket.lock_for_snapshot($11, $12, $13, $14, $15)
    END AS locked
FROM stored;

-- name: take_event
-- Locks a stored event unless another process has it. $1 webhook id.
SELECT webhook_id, type, state, attempts, deliveries, body_sha256, subscription_id, hook_state, payload
FROM kitrocket.webhook_events
WHERE webhook_id = $1
FOR UPDATE SKIP LOCKED;

-- name: wait_for_event
-- Locks a stored event. $1 webhook id.
SELECT webhook_id, type, state, attempts, deliveries, body_sha256, subscription_id, hook_state, payload
FROM kitrocket.webhook_events
WHERE webhook_id = $1
FOR UPDATE;

-- name: events_to_retry
-- Unfinished events that are due, and parked or dead ones whose missing user or payment has appeared, oldest first.
-- $1 now.
SELECT e.webhook_id
FROM kitrocket.webhook_events e
WHERE
    e.payload IS NOT NULL
    AND (
        (e.state IN ('received', 'parked') AND e.next_attempt_at <= $1)
        OR (
            e.state IN ('parked', 'dead') AND e.reason = 'no_user'
            AND EXISTS (SELECT 1 FROM users u WHERE u.id = e.user_hint)
        )
        OR (
            e.state IN ('parked', 'dead') AND e.reason IN ('no_user', 'ambiguous_user') AND e.user_hint IS NULL
            AND (
                EXISTS (
                    SELECT 1 FROM kitrocket.dodo_subscriptions m
                    WHERE m.subscription_id = e.subscription_id AND m.user_id IS NOT NULL
                )
                OR 1 = (
                    SELECT count(*)
                    FROM (
                        SELECT m.user_id FROM kitrocket.dodo_subscriptions m
                        WHERE m.customer_id = e.customer_id AND m.user_id IS NOT NULL
                        UNION
                        SELECT s.user_id FROM subscriptions s WHERE s.dodo_customer_id = e.customer_id
                    ) AS candidates
                )
                OR (
                    e.reason = 'no_user'
                    AND EXISTS (
                        SELECT 1 FROM users u
                        WHERE lower(u.email) = e.customer_email AND u.email_verified IS NOT NULL
                    )
                )
            )
        )
        OR (
            e.state IN ('parked', 'dead') AND e.reason = 'unknown_payment'
            AND EXISTS (
                SELECT 1 FROM kitrocket.dodo_payments p WHERE p.payment_id = e.payment_id AND p.status IS NOT NULL
            )
        )
    )
ORDER BY e.event_at, e.webhook_id;

-- name: events_of_unknown_kind
-- Events parked for a product or a status that was not known, with their bodies, oldest first.
SELECT webhook_id, payload
FROM kitrocket.webhook_events
WHERE state IN ('parked', 'dead') AND reason IN ('unknown_product', 'unknown_status') AND payload IS NOT NULL
ORDER BY event_at, webhook_id;

-- name: lease_hook
-- Takes the event or incident whose hooks have waited longest, until a lease runs out. Of the types that are listened
-- to alone: others may be for another process. $1 now, $2 end of the lease, $3 types, $4 families, $5 whether all.
WITH event AS (
    SELECT webhook_id FROM kitrocket.webhook_events
    WHERE
        hook_state = 'pending' AND hook_next_at <= $1
        AND ($5 OR type = ANY($3::text[]) OR split_part(type, '.', 1) = ANY($4::text[]))
    ORDER BY hook_next_at LIMIT 1 FOR UPDATE SKIP LOCKED
)
UPDATE kitrocket.webhook_events e
SET hook_attempts = e.hook_attempts + 1, hook_next_at = $2
FROM event
WHERE e.webhook_id = event.webhook_id
RETURNING
    e.webhook_id, e.type, e.event_at, e.user_id, e.subscription_id, e.payment_id, e.state, e.payload, e.hook_attempts;

-- name: lease_incident_hook
-- The same for incidents.
WITH incident AS (
    SELECT id FROM kitrocket.billing_incidents
    WHERE
        hook_state = 'pending' AND hook_next_at <= $1
        AND ($5 OR 'incident.' || kind = ANY($3::text[]) OR 'incident' = ANY($4::text[]))
    ORDER BY hook_next_at LIMIT 1 FOR UPDATE SKIP LOCKED
)
UPDATE kitrocket.billing_incidents i
SET hook_attempts = i.hook_attempts + 1, hook_next_at = $2
FROM incident
WHERE i.id = incident.id
RETURNING i.id, i.kind, i.subject, i.opened_at, i.user_id, i.detail, i.hook_attempts;

-- name: settle_hook
-- Notes what became of an event's hooks, unless the lease was taken by another meanwhile. $1 webhook id, $2 state,
-- $3 when to try again, $4 the attempt.
UPDATE kitrocket.webhook_events SET hook_state = $2, hook_next_at = $3 WHERE webhook_id = $1 AND hook_attempts = $4
RETURNING webhook_id;

-- name: settle_incident_hook
-- The same for an incident.
UPDATE kitrocket.billing_incidents SET hook_state = $2, hook_next_at = $3 WHERE id = $1 AND hook_attempts = $4
RETURNING id;

-- name: lock_events_of_user
-- Locks the events with a payload that are about a user, by their ids: those of the user, those that name the user, and
-- those of the user's customers at the provider that nobody else is linked to. Before any other lock. $1 user.
SELECT webhook_id
FROM kitrocket.webhook_events
WHERE
    payload IS NOT NULL
    AND webhook_id IN (
        SELECT webhook_id FROM kitrocket.webhook_events WHERE user_id = $1
        UNION
        SELECT webhook_id FROM kitrocket.webhook_events WHERE user_hint = $1
        UNION
        SELECT e.webhook_id
        FROM kitrocket.dodo_subscriptions m
        JOIN kitrocket.webhook_events e ON e.customer_id = m.customer_id AND e.user_id IS NULL
        WHERE m.user_id = $1
    )
ORDER BY webhook_id
FOR UPDATE;

-- name: lock_user
-- Locks a user's subscription rows until the end of the transaction. $1 user.
SELECT pg_advisory_xact_lock(1802633219, hashtext($1));

-- name: clear_events
-- Takes the payloads out of locked events. $1 webhook ids.
UPDATE kitrocket.webhook_events SET payload = NULL, customer_email = NULL WHERE webhook_id = ANY($1::text[])
RETURNING webhook_id;

-- name: purge_events
-- Takes the payloads out of events that finished, or came unfinished, too long ago; a thousand at most.
-- $1 finished before, $2 received before.
UPDATE kitrocket.webhook_events
SET payload = NULL, customer_email = NULL
WHERE
    webhook_id IN (
        SELECT webhook_id FROM kitrocket.webhook_events
        WHERE payload IS NOT NULL AND (finished_at < $1 OR (finished_at IS NULL AND received_at < $2))
        LIMIT 1000 FOR UPDATE SKIP LOCKED
    )
RETURNING webhook_id;

-- name: purge_events_of_nobody
-- Takes the payloads out of events whose user was deleted past kitrocket; a thousand at most.
UPDATE kitrocket.webhook_events
SET payload = NULL, customer_email = NULL
WHERE
    webhook_id IN (
        SELECT e.webhook_id FROM kitrocket.webhook_events e
        WHERE
            e.payload IS NOT NULL AND e.user_id IS NOT NULL
            AND NOT EXISTS (SELECT 1 FROM users u WHERE u.id = e.user_id)
        LIMIT 1000 FOR UPDATE SKIP LOCKED
    )
RETURNING webhook_id;

-- name: list_events
-- Events of the inbox without their payloads, newest first. $1 states or NULL, $2 reasons or NULL, $3 subscription or
-- NULL, $4 user or NULL, $5 states of the hooks or NULL, $6 at most.
SELECT
    webhook_id, type, subscription_id, payment_id, user_id, event_at, received_at, state, reason, attempts,
    next_attempt_at, last_error, deliveries, finished_at, hook_state, hook_attempts, payload IS NOT NULL AS has_payload
FROM kitrocket.webhook_events
WHERE
    ($1::text[] IS NULL OR state = ANY($1)) AND ($2::text[] IS NULL OR reason = ANY($2))
    AND ($3::text IS NULL OR subscription_id = $3) AND ($4::text IS NULL OR user_id = $4)
    AND ($5::text[] IS NULL OR hook_state = ANY($5))
ORDER BY received_at DESC, webhook_id DESC
LIMIT $6;

-- name: show_event
-- An event of the inbox without its payload. $1 webhook id.
SELECT
    webhook_id, type, subscription_id, payment_id, user_id, event_at, received_at, state, reason, attempts,
    next_attempt_at, last_error, deliveries, finished_at, hook_state, hook_attempts, payload IS NOT NULL AS has_payload
FROM kitrocket.webhook_events
WHERE webhook_id = $1;
