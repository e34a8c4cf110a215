-- The life of a session, in the words that the statements below are written in:
--   cap     created_at + max_lifetime; without a max_lifetime (NULL) there is none
--   live    expires_at > now, and cap > now: at the very instant it is dead
--   short   expires_at - created_at < ttl - 60 s: a session that is not remembered; it never slides
--   target  the earlier of now + ttl and the cap
--   due     live, not short, expires_at - ttl + update_age <= now, expires_at < target
--   seen    the later of created_at and expires_at - ttl
-- least() and greatest() pass over NULL. Columns hold naive UTC; answers carry their time zone.

-- name: create
-- Stores a session. A user that does not exist violates the foreign key.
-- $1 id, $2 user, $3 token as stored, $4 expires_at, $5 IP address, $6 user agent, $7 now
INSERT INTO sessions (id, user_id, token, expires_at, ip_address, user_agent, created_at)
VALUES ($1, $2, $3, $4, $5, $6, $7);

-- name: lock_user
-- Locks a user's row, so that logins of one user are counted one after the other.
-- $1 user
SELECT id FROM users WHERE id = $1 FOR NO KEY UPDATE;

-- name: delete_beyond
-- Deletes a user's oldest live sessions beyond a number. The user's row must have been locked by an earlier statement:
-- this one's snapshot has to be younger than that wait.
-- $1 user, $2 number to keep, $3 now, $4 max_lifetime or NULL
WITH beyond AS MATERIALIZED (
    SELECT s.id
    FROM sessions s
    WHERE s.user_id = $1 AND s.expires_at > $3 AND ($4::interval IS NULL OR s.created_at + $4::interval > $3)
    ORDER BY s.created_at DESC, s.id DESC
    OFFSET $2::bigint
), locked AS MATERIALIZED (
    SELECT s.id FROM sessions s JOIN beyond ON beyond.id = s.id ORDER BY s.id FOR UPDATE OF s
)
DELETE FROM sessions s USING locked WHERE s.id = locked.id AND s.user_id = $1;

-- name: validate
-- Finds a live session with its user, and slides its expiry when that is due; otherwise it writes nothing.
-- The whole due test stands beside the lock: PostgreSQL repeats it on the row as it is once locked, so that of many
-- callers one slides. A row that another holds is skipped, so validating never waits.
-- $1 token as stored, $2 now, $3 ttl, $4 update_age, $5 max_lifetime or NULL
WITH due AS MATERIALIZED (
    SELECT s.id, least($2::timestamp + $3::interval, s.created_at + $5::interval) AS target
    FROM sessions s
    WHERE s.token = $1
      AND s.expires_at > $2
      AND ($5::interval IS NULL OR s.created_at + $5::interval > $2)
      AND s.expires_at >= s.created_at + $3::interval - interval '60 seconds'
      AND s.expires_at - $3::interval + $4::interval <= $2
      AND s.expires_at < least($2::timestamp + $3::interval, s.created_at + $5::interval)
    FOR NO KEY UPDATE SKIP LOCKED
), slid AS (
    UPDATE sessions s SET expires_at = due.target FROM due WHERE s.id = due.id RETURNING s.id, s.expires_at
), found AS (
    SELECT s.id, s.user_id, s.ip_address, s.user_agent, s.created_at, slid.id IS NOT NULL AS refreshed,
           least(coalesce(slid.expires_at, s.expires_at), s.created_at + $5::interval) AS expires_at
    FROM sessions s
    LEFT JOIN slid ON slid.id = s.id
    WHERE s.token = $1
      AND s.expires_at > $2
      AND ($5::interval IS NULL OR s.created_at + $5::interval > $2)
)
SELECT f.id,
       f.user_id,
       f.expires_at AT TIME ZONE 'UTC' AS expires_at,
       f.created_at AT TIME ZONE 'UTC' AS created_at,
       greatest(f.created_at, f.expires_at - $3::interval) AT TIME ZONE 'UTC' AS seen_at,
       nullif(f.ip_address, '') AS ip_address,
       nullif(f.user_agent, '') AS user_agent,
       f.refreshed,
       u.email,
       u.name,
       u.email_verified AT TIME ZONE 'UTC' AS email_verified,
       u.avatar,
       u.created_at AT TIME ZONE 'UTC' AS user_created_at,
       u.updated_at AT TIME ZONE 'UTC' AS user_updated_at
FROM found f
JOIN users u ON u.id = f.user_id;

-- name: validate_many
-- As validate, for many tokens, each at an instant of its own. A token may be asked for twice, and slides once.
-- The answers name the token and the instant that they belong to, and come in any order. The arrays are wrapped, so that
-- the planner doesn't see how long they are: a plan made for a short one looks cheaper than the plan for all, so that it
-- would plan each call anew, which takes four times as long as the call.
-- $1 tokens as stored, $2 instants, $3 ttl, $4 update_age, $5 max_lifetime or NULL
WITH asked AS MATERIALIZED (
    SELECT a.token, a.instant
    FROM unnest((SELECT $1::text[]), (SELECT $2::timestamp[])) AS a (token, instant)
), due AS MATERIALIZED (
    SELECT s.id, least(a.instant + $3::interval, s.created_at + $5::interval) AS target
    FROM asked a
    JOIN sessions s ON s.token = a.token
    WHERE s.expires_at > a.instant
      AND ($5::interval IS NULL OR s.created_at + $5::interval > a.instant)
      AND s.expires_at >= s.created_at + $3::interval - interval '60 seconds'
      AND s.expires_at - $3::interval + $4::interval <= a.instant
      AND s.expires_at < least(a.instant + $3::interval, s.created_at + $5::interval)
    FOR NO KEY UPDATE OF s SKIP LOCKED
), slid AS (
    UPDATE sessions s SET expires_at = due.target FROM due WHERE s.id = due.id RETURNING s.id, s.expires_at
), found AS (
    SELECT s.id, s.user_id, s.ip_address, s.user_agent, s.created_at, slid.id IS NOT NULL AS refreshed,
           least(coalesce(slid.expires_at, s.expires_at), s.created_at + $5::interval) AS expires_at,
           a.token, a.instant
    FROM asked a
    JOIN sessions s ON s.token = a.token
    LEFT JOIN slid ON slid.id = s.id
    WHERE s.expires_at > a.instant
      AND ($5::interval IS NULL OR s.created_at + $5::interval > a.instant)
)
SELECT f.id,
       f.user_id,
       f.expires_at AT TIME ZONE 'UTC' AS expires_at,
       f.created_at AT TIME ZONE 'UTC' AS created_at,
       greatest(f.created_at, f.expires_at - $3::interval) AT TIME ZONE 'UTC' AS seen_at,
       nullif(f.ip_address, '') AS ip_address,
       nullif(f.user_agent, '') AS user_agent,
       f.refreshed,
       u.email,
       u.name,
       u.email_verified AT TIME ZONE 'UTC' AS email_verified,
       u.avatar,
       u.created_at AT TIME ZONE 'UTC' AS user_created_at,
       u.updated_at AT TIME ZONE 'UTC' AS user_updated_at,
       f.token AS asked_token,
       f.instant AS asked_instant
FROM found f
JOIN users u ON u.id = f.user_id;

-- name: look_up
-- As validate, without sliding: only reads, so it may run on a replica. The array is wrapped as in validate_many.
-- $1 the forms that the token may be stored in, $2 now, $3 ttl, $4 max_lifetime or NULL
WITH found AS (
    SELECT s.id, s.user_id, s.ip_address, s.user_agent, s.created_at,
           least(s.expires_at, s.created_at + $4::interval) AS expires_at
    FROM sessions s
    WHERE s.token = ANY ((SELECT $1::text[])::text[])
      AND s.expires_at > $2
      AND ($4::interval IS NULL OR s.created_at + $4::interval > $2)
)
SELECT f.id,
       f.user_id,
       f.expires_at AT TIME ZONE 'UTC' AS expires_at,
       f.created_at AT TIME ZONE 'UTC' AS created_at,
       greatest(f.created_at, f.expires_at - $3::interval) AT TIME ZONE 'UTC' AS seen_at,
       nullif(f.ip_address, '') AS ip_address,
       nullif(f.user_agent, '') AS user_agent,
       false AS refreshed,
       u.email,
       u.name,
       u.email_verified AT TIME ZONE 'UTC' AS email_verified,
       u.avatar,
       u.created_at AT TIME ZONE 'UTC' AS user_created_at,
       u.updated_at AT TIME ZONE 'UTC' AS user_updated_at
FROM found f
JOIN users u ON u.id = f.user_id;

-- name: list
-- A page of a user's live sessions, newest first, without their tokens.
-- $1 user, $2 now, $3 ttl, $4 max_lifetime or NULL, $5 the forms that the current token may be stored in,
-- $6 number of rows, $7 NULL or the id of the last session of the page before, $8 its created_at, NULL: look it up
WITH live AS (
    SELECT s.*, least(s.expires_at, s.created_at + $4::interval) AS ends_at
    FROM sessions s
    WHERE s.user_id = $1
      AND s.expires_at > $2
      AND ($4::interval IS NULL OR s.created_at + $4::interval > $2)
      AND ($7::text IS NULL OR (s.created_at, s.id) < (
          coalesce($8::timestamp, (SELECT p.created_at FROM sessions p WHERE p.id = $7 AND p.user_id = $1)), $7
      ))
    ORDER BY s.created_at DESC, s.id DESC
    LIMIT $6::bigint
)
SELECT l.id,
       l.user_id,
       l.ends_at AT TIME ZONE 'UTC' AS expires_at,
       l.created_at AT TIME ZONE 'UTC' AS created_at,
       greatest(l.created_at, l.ends_at - $3::interval) AT TIME ZONE 'UTC' AS seen_at,
       nullif(l.ip_address, '') AS ip_address,
       nullif(l.user_agent, '') AS user_agent,
       l.token = ANY ($5::text[]) AS is_current
FROM live l
ORDER BY l.created_at DESC, l.id DESC;

-- name: revoke
-- Deletes one session of a user; answers how many rows went.
-- $1 session, $2 user
WITH gone AS (DELETE FROM sessions WHERE id = $1 AND user_id = $2 RETURNING 1)
SELECT count(*) FROM gone;

-- name: revoke_others
-- Deletes every session of a user but one, expired ones too; answers how many rows went. Rows are locked in id order,
-- so that two of these statements never wait for each other. The user is named once more for the planner's sake: by id
-- alone it may read the whole table for a user with very many sessions.
-- $1 user, $2 the forms that the token to keep may be stored in
WITH locked AS MATERIALIZED (
    SELECT s.id FROM sessions s WHERE s.user_id = $1 AND s.token <> ALL ($2::text[]) ORDER BY s.id FOR UPDATE
), gone AS (
    DELETE FROM sessions s USING locked WHERE s.id = locked.id AND s.user_id = $1 RETURNING 1
)
SELECT count(*) FROM gone;

-- name: revoke_many
-- Deletes every session of some users, expired ones too; answers how many rows went.
-- $1 users
WITH locked AS MATERIALIZED (
    SELECT s.id FROM sessions s WHERE s.user_id = ANY ($1::text[]) ORDER BY s.id FOR UPDATE
), gone AS (
    DELETE FROM sessions s USING locked WHERE s.id = locked.id AND s.user_id = ANY ($1::text[]) RETURNING 1
)
SELECT count(*) FROM gone;

-- name: rotate
-- After a change of how a user signs in: the session to keep gets a new id and token, the others are deleted, expired
-- ones too. With a proven login it also begins anew; a short one stays short (a max_lifetime below ttl makes none
-- short). A session to keep that is not live is one of the others. Answers one row: how many were deleted, and the kept
-- session or NULLs. The user's row must have been locked by an earlier statement. Rows are locked in id order, as by
-- revoke_others.
-- $1 user, $2 the forms that the token to keep may be stored in, $3 now, $4 ttl, $5 short_ttl, $6 max_lifetime or NULL,
-- $7 whether the others go, $8 whether the login was proven, $9 new id, $10 new token as stored
WITH locked AS MATERIALIZED (
    SELECT s.id,
           s.token = ANY ($2::text[])
           AND s.expires_at > $3
           AND ($6::interval IS NULL OR s.created_at + $6::interval > $3) AS is_kept
    FROM sessions s
    WHERE s.user_id = $1
    ORDER BY s.id
    FOR UPDATE
), kept AS (
    UPDATE sessions s
    SET id = $9,
        token = $10,
        created_at = CASE WHEN $8 THEN $3 ELSE s.created_at END,
        expires_at = CASE
            WHEN NOT $8 THEN s.expires_at
            WHEN s.expires_at < s.created_at + least($4::interval, $6::interval) - interval '60 seconds' THEN
                $3::timestamp + least($5::interval, $6::interval)
            ELSE $3::timestamp + least($4::interval, $6::interval)
        END
    FROM locked
    WHERE locked.is_kept AND s.id = locked.id
    RETURNING s.id, s.created_at, s.ip_address, s.user_agent,
              least(s.expires_at, s.created_at + $6::interval) AS expires_at
), gone AS (
    DELETE FROM sessions s USING locked
    WHERE $7 AND NOT locked.is_kept AND s.id = locked.id AND s.user_id = $1
    RETURNING 1
)
SELECT (SELECT count(*) FROM gone) AS revoked,
       k.id,
       k.expires_at AT TIME ZONE 'UTC' AS expires_at,
       k.created_at AT TIME ZONE 'UTC' AS created_at,
       greatest(k.created_at, k.expires_at - $4::interval) AT TIME ZONE 'UTC' AS seen_at,
       nullif(k.ip_address, '') AS ip_address,
       nullif(k.user_agent, '') AS user_agent
FROM (SELECT 1) AS one
LEFT JOIN kept k ON true;

-- name: delete_expired
-- Deletes one batch of expired sessions, oldest first; answers how many went, how many it found, the expiry of the last,
-- and whether it skipped older ones, which others hold: other sweepers take other rows. The CTE is materialised, since a
-- bare IN (… LIMIT) can run again per row and exceed the limit; the condition is repeated, since a row may have been
-- extended before it was locked. A row that is locked stays where it is, so it is deleted by its place. One that was
-- changed between snapshot and lock has another place, which this snapshot does not show: it is found, but doesn't go
-- yet. A batch begins where the one before left off, or it would read all the index entries again that the others
-- killed. When the transaction is the batch's own, its commit doesn't wait for the disk: a batch that a crash loses is
-- swept again.
-- $1 the expiry to end at: now, or before; $2 number of rows, $3 whether the transaction is the batch's own, $4 the
-- expiry to begin at, NULL: the oldest
WITH expired AS MATERIALIZED (
    SELECT s.ctid AS place, s.expires_at
    FROM sessions s
    WHERE s.expires_at <= $1 AND s.expires_at >= coalesce($4::timestamp, '-infinity')
    ORDER BY s.expires_at
    LIMIT $2::bigint
    FOR UPDATE SKIP LOCKED
), gone AS (
    DELETE FROM sessions s WHERE s.ctid = ANY (ARRAY(SELECT place FROM expired)) AND s.expires_at <= $1 RETURNING 1
)
SELECT (SELECT count(*) FROM gone) AS gone,
       (SELECT count(*) FROM expired) AS found,
       (SELECT max(expires_at) FROM expired) AS last,
       (
           SELECT min(s.expires_at)
           FROM sessions s
           WHERE s.expires_at >= coalesce($4::timestamp, '-infinity')
             AND s.expires_at < (SELECT min(expires_at) FROM expired)
       ) IS NOT NULL AS skipped,
       CASE WHEN $3::boolean THEN set_config('synchronous_commit', 'off', true) END;

-- name: delete_outlived
-- As delete_expired, for sessions past their cap, which only another writer keeps beyond it.
-- $1 the creation to end at: now - max_lifetime, or before; $2 number of rows, $3 whether the transaction is the batch's
-- own, $4 the creation to begin at, NULL: the oldest
WITH outlived AS MATERIALIZED (
    SELECT s.ctid AS place, s.created_at
    FROM sessions s
    WHERE s.created_at <= $1 AND s.created_at >= coalesce($4::timestamp, '-infinity')
    ORDER BY s.created_at
    LIMIT $2::bigint
    FOR UPDATE SKIP LOCKED
), gone AS (
    DELETE FROM sessions s WHERE s.ctid = ANY (ARRAY(SELECT place FROM outlived)) AND s.created_at <= $1 RETURNING 1
)
SELECT (SELECT count(*) FROM gone) AS gone,
       (SELECT count(*) FROM outlived) AS found,
       (SELECT max(created_at) FROM outlived) AS last,
       (
           SELECT min(s.created_at)
           FROM sessions s
           WHERE s.created_at >= coalesce($4::timestamp, '-infinity')
             AND s.created_at < (SELECT min(created_at) FROM outlived)
       ) IS NOT NULL AS skipped,
       CASE WHEN $3::boolean THEN set_config('synchronous_commit', 'off', true) END;

-- name: any_expired
-- Whether a session is left to sweep. It asks for the oldest, which an index answers; asked whether one exists, the
-- planner may read the whole table, since its statistics still know all that was swept.
-- $1 now, $2 now - max_lifetime, or NULL when nobody else writes
SELECT coalesce((SELECT min(s.expires_at) FROM sessions s) <= $1, false)
    OR ($2::timestamp IS NOT NULL AND coalesce((SELECT min(s.created_at) FROM sessions s) <= $2, false));

-- name: count_expired
-- How many sessions there are to sweep.
-- $1 now, $2 now - max_lifetime, or NULL when nobody else writes
SELECT count(*) FROM sessions s WHERE s.expires_at <= $1 OR s.created_at <= $2::timestamp;

-- name: digest_tokens
-- Replaces one batch of tokens that are stored plain by their digests, in id order; answers how many, and the id of the
-- last. The condition is repeated, since a row may have been replaced before it was locked. Rows are locked in id
-- order, as by revoke_others.
-- $1 the id of the last row of the batch before, or '', $2 number of rows
WITH plain AS MATERIALIZED (
    SELECT s.id FROM sessions s WHERE s.id > $1 AND s.token NOT LIKE 'k1$%' ORDER BY s.id LIMIT $2::bigint FOR UPDATE
), digested AS (
    UPDATE sessions s
    SET token = 'k1$' || encode(sha256(convert_to(s.token, 'UTF8')), 'hex')
    FROM plain
    WHERE s.id = plain.id AND s.token NOT LIKE 'k1$%'
    RETURNING s.id
)
SELECT count(*) AS count, max(id) AS last FROM digested;

-- name: any_plain
-- Whether a session with a plain token comes after another session.
-- $1 the id of the last row that was looked at
SELECT EXISTS (SELECT FROM sessions s WHERE s.id > $1 AND s.token NOT LIKE 'k1$%');

-- name: count_plain
-- How many sessions have a plain token.
SELECT count(*) FROM sessions s WHERE s.token NOT LIKE 'k1$%';
